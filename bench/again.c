// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Runs two programs in turns on one packet by BPF_PROG_TEST_RUN, and says how long each took: bench/programs.ts starts it,
 * as a loop in C leaves the processor's caches and what it has learnt of branches to the kernel and the programs.
 *
 *   again PROGRAM OTHER RUNS <PACKET      two pinned programs; each run has a fresh copy of the packet
 *
 * Prints the nanoseconds of each: the mean of the middle half of its runs, as the clock may count in tens.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WARM_UP 500
#define MAX_PACKET 2048

static void fail(const char *what)
{
	fprintf(stderr, "again: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int open_program(const char *path)
{
	union bpf_attr attr = {};
	int fd;

	attr.pathname = (uint64_t)(uintptr_t)path;
	fd = syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof(attr));
	if (fd < 0)
		fail(path);
	return fd;
}

static uint32_t run(int program, const char *packet, size_t length)
{
	/* The loopback interface, as the tests of the programs have it. */
	struct __sk_buff context = { .ifindex = 1 };
	union bpf_attr attr = {};

	attr.test.prog_fd = program;
	attr.test.data_in = (uint64_t)(uintptr_t)packet;
	attr.test.data_size_in = length;
	attr.test.ctx_in = (uint64_t)(uintptr_t)&context;
	attr.test.ctx_size_in = sizeof(context);
	attr.test.repeat = 1;
	if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr)))
		fail("BPF_PROG_TEST_RUN");
	return attr.test.duration;
}

static int compare(const void *a, const void *b)
{
	uint32_t first = *(const uint32_t *)a, second = *(const uint32_t *)b;

	return (first > second) - (first < second);
}

static double middle(uint32_t *times, int runs)
{
	double sum = 0;
	int from = runs / 4, to = runs - runs / 4;

	qsort(times, runs, sizeof(*times), compare);
	for (int i = from; i < to; i++)
		sum += times[i];
	return sum / (to - from);
}

int main(int argc, char **argv)
{
	static char packet[MAX_PACKET];
	uint32_t *times[2];
	int programs[2], runs;
	size_t length;

	if (argc != 4 || (runs = atoi(argv[3])) < 4) {
		fputs("usage: again PROGRAM OTHER RUNS <PACKET\n", stderr);
		return 2;
	}
	length = fread(packet, 1, sizeof(packet), stdin);
	for (int i = 0; i < 2; i++) {
		programs[i] = open_program(argv[1 + i]);
		times[i] = calloc(runs, sizeof(*times[i]));
		if (!times[i])
			fail("memory");
	}
	for (int at = -WARM_UP; at < runs; at++)
		for (int i = 0; i < 2; i++) {
			uint32_t time = run(programs[i], packet, length);

			if (at >= 0)
				times[i][at] = time;
		}
	printf("%.1f %.1f\n", middle(times[0], runs), middle(times[1], runs));
	return 0;
}
