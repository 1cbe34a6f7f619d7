// SPDX-License-Identifier: Apache-2.0
/*
 * Runs a program on a kernel that lacks something: some system calls fail as they do there.
 *
 *   oldkernel CALL=ERROR... -- PROGRAM ARGUMENT...
 *
 * CALL is `bpf` (each command), `bpf:N` (command number N of <linux/bpf.h>) or `mount`; ERROR is a number of <errno.h>.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STEPS 128

static struct sock_filter steps[STEPS];
static unsigned short count;

static void add(struct sock_filter step)
{
	if (count == STEPS) {
		fputs("oldkernel: too many calls\n", stderr);
		exit(2);
	}
	steps[count++] = step;
}

/* The next `over` steps are skipped unless the loaded word is `value`. */
static void unless(unsigned int value, unsigned char over)
{
	add((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, over));
}

static void load(size_t offset)
{
	add((struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset));
}

int main(int argc, char **argv)
{
	struct sock_fprog program = { .filter = steps };
	int i;

	for (i = 1; i < argc && strcmp(argv[i], "--"); i++) {
		char *error = strchr(argv[i], '=');
		int is_bpf = !strncmp(argv[i], "bpf", 3), one = is_bpf && argv[i][3] == ':';

		if (!error)
			return 2;
		load(offsetof(struct seccomp_data, nr));
		unless(is_bpf ? SYS_bpf : SYS_mount, one ? 3 : 1);
		if (one) {
			/* The lower half comes first. */
			load(offsetof(struct seccomp_data, args[0]));
			unless(atoi(argv[i] + 4), 1);
		}
		add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | atoi(error + 1)));
	}
	if (i + 1 >= argc)
		return 2;
	add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
	program.len = count;
	/* With privileges, so that the program under it keeps those that it has. */
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
		perror("oldkernel");
		return 1;
	}
	execvp(argv[i + 1], argv + i + 1);
	perror(argv[i + 1]);
	return 127;
}
