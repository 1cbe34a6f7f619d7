// SPDX-License-Identifier: Apache-2.0
/*
 * The load of the benchmark where no ready tool is exact enough: small UDP packets, TCP request/response and
 * connections per second, between two addresses.
 *
 *   load [-c CPU] sink ADDRESS PORT SECONDS         counts UDP packets for SECONDS, from 0.3 s after the first
 *   load [-c CPU] poll ADDRESS PORT SECONDS         the same, never asleep: no packet has to wake it
 *   load [-c CPU] blast ADDRESS PORT SECONDS SIZE [RATE]
 *                                                   sends UDP packets of SIZE bytes as fast as it can, or RATE a second
 *   load [-c CPU] serve ADDRESS PORT SECONDS        answers rr and crr for SECONDS at most
 *   load [-c CPU] rr ADDRESS PORT SECONDS           one byte there and back over one connection
 *   load [-c CPU] crr ADDRESS PORT SECONDS [RATE]   the same with a connection for each, RATE of them a second at most
 *   load answer ADDRESS PORT SECONDS PORTS          answers UDP packets on PORTS ports from PORT on
 *   load open ADDRESS PORT SECONDS PORTS COUNT      COUNT flows to those ports, two packets each way on every one
 *
 * Each ends by itself. The result is one line of JSON on stdout (of `open` none); servers print "ready" first, and
 * sink "counting" when it begins to. Only what arrived counts: the sender of UDP packets reports nothing.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define MAX_SIZE 2048
#define MAX_TRIPS 4000000
#define WARM_UP 300000000ull

/* The first byte of a request: whether the server keeps the connection. */
#define KEEP 'k'
#define CLOSE 'c'

static void fail(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int open_socket(int type)
{
	int fd = socket(AF_INET, type, 0), one = 1, buffer = 4 << 20;

	if (fd < 0)
		fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (type == SOCK_DGRAM && setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof(buffer)))
		fail("receive buffer");
	return fd;
}

static void no_delay(int fd)
{
	int one = 1;

	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		fail("TCP_NODELAY");
}

static void sink(struct sockaddr_in *address, double seconds, int polls)
{
	static char bytes[BATCH][MAX_SIZE];
	struct mmsghdr messages[BATCH] = {};
	struct iovec parts[BATCH];
	struct timeval patience = { .tv_sec = 5 };
	uint64_t packets = 0, begin = 0, end = 0, at;
	int fd = open_socket(SOCK_DGRAM), n, counts = 0, how = MSG_WAITFORONE;

	for (int i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){ bytes[i], MAX_SIZE };
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (bind(fd, (struct sockaddr *)address, sizeof(*address)))
		fail("bind");
	puts("ready");
	do {
		n = recvmmsg(fd, messages, BATCH, how, NULL);
		if (n < 0 && how == MSG_DONTWAIT && errno == EAGAIN)
			n = 0;
		if (n < 0)
			fail("no packet arrived");
		at = now();
		if (!begin) {
			/* The first one is waited for in any case. */
			how = polls ? MSG_DONTWAIT : MSG_WAITFORONE;
			begin = at + WARM_UP;
			end = begin + (uint64_t)(seconds * 1e9);
		}
		if (at < begin)
			continue;
		if (!counts)
			puts("counting");
		counts = 1;
		packets += n;
	} while (at < end);
	printf("{\"packetsPerSecond\": %.1f}\n", packets / ((at - begin) / 1e9));
}

/* The pace is the load itself: sleeps until this many packets may have been sent since the beginning. */
static void keep_pace(uint64_t begin, uint64_t packets, double rate)
{
	uint64_t due = begin + (uint64_t)(packets / rate * 1e9);
	struct timespec t = { .tv_sec = due / 1000000000, .tv_nsec = due % 1000000000 };

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static void blast(struct sockaddr_in *address, double seconds, size_t size, double rate)
{
	static char bytes[MAX_SIZE];
	struct mmsghdr messages[BATCH] = {};
	struct iovec part = { bytes, size };
	uint64_t begin = now(), end = begin + (uint64_t)(seconds * 1e9), packets = 0;
	int fd = open_socket(SOCK_DGRAM);

	if (size > MAX_SIZE)
		size = MAX_SIZE;
	if (connect(fd, (struct sockaddr *)address, sizeof(*address)))
		fail("connect");
	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &part;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	while (now() < end) {
		/* The receiver may have closed already, and a full queue is what we are here for. */
		if (sendmmsg(fd, messages, BATCH, 0) < 0 && errno != ECONNREFUSED && errno != ENOBUFS)
			fail("send");
		packets += BATCH;
		if (rate > 0)
			keep_pace(begin, packets, rate);
	}
}

static void serve(struct sockaddr_in *address)
{
	int listener = open_socket(SOCK_STREAM), fd;
	char request;

	if (bind(listener, (struct sockaddr *)address, sizeof(*address)) || listen(listener, 1024))
		fail("listen");
	puts("ready");
	while ((fd = accept(listener, NULL, NULL)) >= 0) {
		no_delay(fd);
		while (recv(fd, &request, 1, 0) == 1) {
			if (send(fd, &request, 1, MSG_NOSIGNAL) != 1)
				break;
			if (request == CLOSE)
				break;
		}
		/* We close first, so that the client's port is free again at once. */
		close(fd);
	}
	fail("accept");
}

static int dial(struct sockaddr_in *address)
{
	int fd = open_socket(SOCK_STREAM);

	if (connect(fd, (struct sockaddr *)address, sizeof(*address)))
		fail("connect");
	no_delay(fd);
	return fd;
}

static void trip(int fd, char request)
{
	char reply;

	if (send(fd, &request, 1, 0) != 1)
		fail("send");
	if (recv(fd, &reply, 1, 0) != 1)
		fail("receive");
}

static int ascending(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static void rr(struct sockaddr_in *address, double seconds)
{
	uint32_t *trips = malloc(MAX_TRIPS * sizeof(*trips));
	int fd = dial(address);
	uint64_t begin, at = now(), end;
	size_t count = 0;

	if (!trips)
		fail("memory");
	for (uint64_t warm = at + WARM_UP; at < warm; at = now())
		trip(fd, KEEP);
	begin = at;
	end = begin + (uint64_t)(seconds * 1e9);
	while (at < end && count < MAX_TRIPS) {
		uint64_t before = at;

		trip(fd, KEEP);
		at = now();
		trips[count++] = at - before;
	}
	qsort(trips, count, sizeof(*trips), ascending);
	printf("{\"p50\": %.2f, \"p99\": %.2f, \"perSecond\": %.1f}\n", trips[count / 2] / 1e3,
	       trips[count * 99 / 100] / 1e3, count / ((at - begin) / 1e9));
}

static void crr(struct sockaddr_in *address, double seconds, double rate)
{
	uint64_t begin = now(), at = begin, end = begin + (uint64_t)(seconds * 1e9), count = 0;

	while (at < end) {
		int fd = dial(address);
		char rest;

		trip(fd, CLOSE);
		if (recv(fd, &rest, 1, 0) != 0)
			fail("the server did not close");
		close(fd);
		count++;
		if (rate > 0)
			keep_pace(begin, count, rate);
		at = now();
	}
	printf("{\"connectionsPerSecond\": %.1f}\n", count / ((at - begin) / 1e9));
}

static struct sockaddr_in port_of(const struct sockaddr_in *address, int index)
{
	struct sockaddr_in name = *address;

	name.sin_port = htons(ntohs(address->sin_port) + index);
	return name;
}

static void answer(struct sockaddr_in *address, int ports)
{
	struct pollfd *sockets = calloc(ports, sizeof(*sockets));

	if (!sockets)
		fail("memory");
	for (int i = 0; i < ports; i++) {
		struct sockaddr_in name = port_of(address, i);

		sockets[i] = (struct pollfd){ .fd = open_socket(SOCK_DGRAM), .events = POLLIN };
		if (bind(sockets[i].fd, (struct sockaddr *)&name, sizeof(name)))
			fail("bind");
	}
	puts("ready");
	while (poll(sockets, ports, -1) > 0) {
		for (int i = 0; i < ports; i++) {
			struct sockaddr_in from;
			socklen_t length = sizeof(from);
			char byte;

			while (recvfrom(sockets[i].fd, &byte, 1, MSG_DONTWAIT, (struct sockaddr *)&from,
					&length) == 1)
				sendto(sockets[i].fd, &byte, 1, 0, (struct sockaddr *)&from, length);
		}
	}
	fail("poll");
}

/* A byte to one port and back, sent again if it was lost: a flow counts once both sides have seen it live. */
static void greet(int fd, const struct sockaddr_in *to)
{
	struct pollfd socket = { .fd = fd, .events = POLLIN };
	struct sockaddr_in from;
	socklen_t length = sizeof(from);
	char byte = 'o';

	for (int tries = 0; tries < 50; tries++) {
		if (sendto(fd, &byte, 1, 0, (const struct sockaddr *)to, sizeof(*to)) < 0)
			fail("send");
		while (poll(&socket, 1, 200) > 0)
			if (recvfrom(fd, &byte, 1, 0, (struct sockaddr *)&from, &length) == 1 &&
			    from.sin_port == to->sin_port)
				return;
	}
	errno = ETIMEDOUT;
	fail("a flow was not answered");
}

static void open_flows(struct sockaddr_in *address, int ports, int count)
{
	for (int done = 0; done < count;) {
		int fd = open_socket(SOCK_DGRAM), off = 0;

		/* Else the kernel may give two of them one port. It stays bound, so that the next has another. */
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &off, sizeof(off));
		for (int i = 0; i < ports && done < count; i++, done++) {
			struct sockaddr_in to = port_of(address, i);

			greet(fd, &to);
			greet(fd, &to);
		}
	}
}

int main(int argc, char **argv)
{
	struct rlimit files = { 65536, 65536 };
	struct sockaddr_in address = { .sin_family = AF_INET };
	const char *mode;
	double seconds;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 2 && !strcmp(argv[1], "-c")) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET(atoi(argv[2]), &set);
		if (sched_setaffinity(0, sizeof(set), &set))
			fail("pin to the CPU");
		argc -= 2;
		argv += 2;
	}
	setrlimit(RLIMIT_NOFILE, &files);
	if (argc < 5 || inet_pton(AF_INET, argv[2], &address.sin_addr) != 1) {
		fputs("usage: load [-c CPU] sink|poll|blast|serve|rr|crr|answer|open ADDRESS PORT SECONDS [SIZE [RATE] | RATE | PORTS [COUNT]]\n", stderr);
		return 2;
	}
	mode = argv[1];
	address.sin_port = htons(atoi(argv[3]));
	seconds = atof(argv[4]);
	/* Whatever happens to the other end, nothing of us stays. */
	alarm((unsigned int)seconds + 10);

	if (!strcmp(mode, "sink") || !strcmp(mode, "poll"))
		sink(&address, seconds, mode[0] == 'p');
	else if (!strcmp(mode, "blast"))
		blast(&address, seconds, argc > 5 ? atoi(argv[5]) : 64, argc > 6 ? atof(argv[6]) : 0);
	else if (!strcmp(mode, "serve"))
		serve(&address);
	else if (!strcmp(mode, "rr"))
		rr(&address, seconds);
	else if (!strcmp(mode, "crr"))
		crr(&address, seconds, argc > 5 ? atof(argv[5]) : 0);
	else if (!strcmp(mode, "answer") && argc > 5)
		answer(&address, atoi(argv[5]));
	else if (!strcmp(mode, "open") && argc > 6)
		open_flows(&address, atoi(argv[5]), atoi(argv[6]));
	else
		return 2;
	return 0;
}
