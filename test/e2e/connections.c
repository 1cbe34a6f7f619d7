// SPDX-License-Identifier: Apache-2.0
/*
 * Many TCP connections, none of which may fail.
 *
 *   connections serve ADDRESS PORT COUNT        echoes on COUNT ports from PORT on; prints "ready", runs until ended
 *   connections hold ADDRESS PORT COUNT N       opens N connections, spread over the ports, and says "open"; at each
 *                                               SIGUSR1 exchanges a byte on every one and says "alive"
 *   connections sequence ADDRESS PORT COUNT N   opens N, one after the other, a byte there and back on each; fewer
 *                                               if SIGTERM ends it
 *
 * `hold` ends at SIGTERM. It and `sequence` end with one line of JSON: how many were made and how many failed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static struct sockaddr_in at(const char *address, int port)
{
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_port = htons(port) };

	if (inet_pton(AF_INET, address, &name.sin_addr) != 1) {
		fprintf(stderr, "%s is no address\n", address);
		exit(2);
	}
	return name;
}

static void must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

static _Noreturn void serve(const char *address, int port, int count)
{
	struct epoll_event event = { .events = EPOLLIN }, events[256];
	int poll = epoll_create1(0), on = 1;
	char listening[65536] = { 0 };

	for (int i = 0; i < count; i++) {
		struct sockaddr_in name = at(address, port + i);
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		must(bind(fd, (struct sockaddr *)&name, sizeof(name)), "bind");
		must(listen(fd, 4096), "listen");
		listening[fd] = 1;
		event.data.fd = fd;
		epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(poll, events, 256, -1);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;
			char byte;

			if (listening[fd]) {
				int client = accept4(fd, 0, 0, SOCK_NONBLOCK);

				if (client < 0)
					continue;
				event.data.fd = client;
				epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
			} else {
				ssize_t got = read(fd, &byte, 1);

				if (got == 1 ? write(fd, &byte, 1) != 1 : got == 0 || errno != EAGAIN)
					close(fd);
			}
		}
	}
}

/* A connection with patience of some seconds, or -1. */
static int open_one(const char *address, int port)
{
	struct sockaddr_in name = at(address, port);
	struct timeval patience = { .tv_sec = 20 };
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (connect(fd, (struct sockaddr *)&name, sizeof(name)) == 0)
		return fd;
	close(fd);
	return -1;
}

static int exchange(int fd)
{
	char byte = 'x';

	return write(fd, &byte, 1) == 1 && read(fd, &byte, 1) == 1 ? 0 : -1;
}

int main(int argc, char **argv)
{
	struct rlimit files = { 65536, 65536 };
	int port, count, n, failed = 0;
	sigset_t signals;
	int signal;

	if (argc < 5)
		return 2;
	port = atoi(argv[3]);
	count = atoi(argv[4]);
	setrlimit(RLIMIT_NOFILE, &files);
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	sigaddset(&signals, SIGTERM);
	if (strcmp(argv[1], "serve"))
		sigprocmask(SIG_BLOCK, &signals, 0);
	if (!strcmp(argv[1], "serve"))
		serve(argv[2], port, count);
	n = argc > 5 ? atoi(argv[5]) : 1;
	if (!strcmp(argv[1], "sequence")) {
		int i;

		/* A signal waits until the connection at hand is done: what is interrupted is not what failed. */
		for (i = 0; i < n && !sigpending(&signals) && !sigismember(&signals, SIGTERM); i++) {
			int fd = open_one(argv[2], port + i % count);

			if (fd < 0 || exchange(fd)) {
				if (!failed)
					fprintf(stderr, "connection %d: %s\n", i, strerror(errno));
				failed++;
			}
			if (fd >= 0)
				close(fd);
		}
		n = i;
	} else {
		int *fds = calloc(n, sizeof(int));

		for (int i = 0; i < n; i++) {
			fds[i] = open_one(argv[2], port + i % count);
			if (fds[i] < 0 || exchange(fds[i])) {
				if (!failed)
					fprintf(stderr, "connection %d: %s\n", i, strerror(errno));
				failed++;
			}
		}
		puts("open");
		fflush(stdout);
		while (!sigwait(&signals, &signal) && signal == SIGUSR1) {
			for (int i = 0; i < n; i++)
				if (exchange(fds[i])) {
					if (!failed)
						fprintf(stderr, "connection %d: %s\n", i, strerror(errno));
					failed++;
				}
			printf("alive %d\n", failed);
			fflush(stdout);
		}
	}
	printf("{\"made\": %d, \"failed\": %d}\n", n, failed);
	return failed > 0;
}
