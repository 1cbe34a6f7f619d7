/*
 * A node of the backend udp as it is where a process carries the packets: between a TUN device and a UDP socket, one
 * system call each way. What it does on the wire is the contract that ours is held to: the IP packet is the payload;
 * both ports are the same one; each end takes one off the hop limit and rewrites the checksum; what has no hop left is
 * dropped; what nobody holds is answered by an ICMP "network unreachable"; whoever sends to the port is believed.
 *
 *   udp-peer DEVICE OWN-ADDRESS PORT SUBNET-ADDRESS SUBNET/LENGTH=PEER...
 *
 * It makes DEVICE, which has no address yet, prints "ready", and runs until it is ended.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PEERS 64

static struct {
	in_addr_t subnet, mask, address;
} peers[PEERS];
static int count;
static int tun, sock;
static in_addr_t own_subnet;
static in_port_t port;

static void die(const char *what)
{
	fprintf(stderr, "udp-peer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static unsigned short checksum(const void *data, size_t length)
{
	const unsigned short *word = data;
	unsigned int sum = 0;

	for (; length > 1; length -= 2)
		sum += *word++;
	if (length)
		sum += *(const unsigned char *)word;
	sum = (sum & 0xffff) + (sum >> 16);
	return ~(sum + (sum >> 16));
}

/* One hop less; 0 if none is left. */
static int hop(struct iphdr *ip)
{
	if (ip->ttl <= 1)
		return 0;
	ip->ttl--;
	ip->check = 0;
	ip->check = checksum(ip, ip->ihl * 4);
	return 1;
}

static int is_whole(const struct iphdr *ip, ssize_t length)
{
	return length >= (ssize_t)sizeof(*ip) && ip->version == 4 && ip->ihl >= 5 &&
	       ntohs(ip->tot_len) == length;
}

static void say_unreachable(const struct iphdr *about, ssize_t length)
{
	struct {
		struct iphdr ip;
		struct icmphdr icmp;
		char quoted[60 + 8];
	} __attribute__((packed)) answer = {};
	size_t quoted = about->ihl * 4 + 8;

	if ((ssize_t)quoted > length)
		quoted = length;
	memcpy(answer.quoted, about, quoted);
	answer.icmp.type = ICMP_DEST_UNREACH;
	answer.icmp.code = ICMP_NET_UNREACH;
	answer.icmp.checksum = checksum(&answer.icmp, sizeof(answer.icmp) + quoted);
	answer.ip.version = 4;
	answer.ip.ihl = 5;
	answer.ip.ttl = 8;
	answer.ip.protocol = IPPROTO_ICMP;
	answer.ip.saddr = own_subnet;
	answer.ip.daddr = about->saddr;
	answer.ip.tot_len = htons(sizeof(answer.ip) + sizeof(answer.icmp) + quoted);
	answer.ip.check = checksum(&answer.ip, sizeof(answer.ip));
	if (write(tun, &answer, ntohs(answer.ip.tot_len)) < 0 && errno != EAGAIN)
		die("write to the device");
}

static int from_device(void)
{
	static char packet[65536];
	struct iphdr *ip = (void *)packet;
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = port };
	ssize_t length = read(tun, packet, sizeof(packet));

	if (length < 0)
		return errno == EAGAIN ? 0 : (die("read from the device"), 0);
	if (!is_whole(ip, length))
		return 1;
	for (int i = 0; i < count; i++)
		if ((ip->daddr & peers[i].mask) == peers[i].subnet)
			to.sin_addr.s_addr = peers[i].address;
	if (!to.sin_addr.s_addr)
		say_unreachable(ip, length);
	else if (hop(ip))
		sendto(sock, packet, length, 0, (void *)&to, sizeof(to)); /* like the network, it may lose one */
	return 1;
}

static int from_net(void)
{
	static char packet[65536];
	struct iphdr *ip = (void *)packet;
	ssize_t length = recv(sock, packet, sizeof(packet), 0);

	if (length < 0)
		return errno == EAGAIN || errno == ECONNREFUSED ? 0 : (die("read from the socket"), 0);
	if (is_whole(ip, length) && hop(ip) && write(tun, packet, length) < 0 && errno != EAGAIN && errno != EINVAL)
		die("write to the device");
	return 1;
}

int main(int argc, char **argv)
{
	struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI };
	struct sockaddr_in own = { .sin_family = AF_INET };
	struct pollfd both[2];

	if (argc < 5 || argc - 5 > PEERS) {
		fprintf(stderr, "udp-peer DEVICE OWN-ADDRESS PORT SUBNET-ADDRESS SUBNET/LENGTH=PEER...\n");
		return 2;
	}
	port = htons(atoi(argv[3]));
	own_subnet = inet_addr(argv[4]);
	for (int i = 5; i < argc; i++) {
		char *length = strchr(argv[i], '/'), *address = strchr(argv[i], '=');

		if (!length || !address) {
			fprintf(stderr, "udp-peer: %s is no SUBNET/LENGTH=PEER\n", argv[i]);
			return 2;
		}
		*length++ = *address++ = 0;
		peers[count].mask = htonl(~0U << (32 - atoi(length)));
		peers[count].subnet = inet_addr(argv[i]);
		peers[count++].address = inet_addr(address);
	}
	tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	strncpy(request.ifr_name, argv[1], IFNAMSIZ - 1);
	if (tun < 0 || ioctl(tun, TUNSETIFF, &request))
		die("cannot make the device");
	sock = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	own.sin_addr.s_addr = inet_addr(argv[2]);
	own.sin_port = port;
	if (sock < 0 || bind(sock, (void *)&own, sizeof(own)))
		die("cannot bind the socket");
	puts("ready");
	fflush(stdout);
	both[0] = (struct pollfd){ .fd = tun, .events = POLLIN };
	both[1] = (struct pollfd){ .fd = sock, .events = POLLIN };
	for (;;) {
		if (poll(both, 2, -1) < 0 && errno != EINTR)
			die("poll");
		/* In turns, so that neither way waits for the other to be empty. */
		for (int more = 1; more;)
			more = from_device() | from_net();
	}
}
