/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * From packet bytes to `struct packet4`, bounds checked. Offsets are constants, so that the verifier follows
 * them; nothing here changes a packet, but reading may have to make its head linear first, after which all
 * pointers into it must be taken anew.
 */
#ifndef TWILL_PARSE_H
#define TWILL_PARSE_H

#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define FRAGMENT_OFFSET bpf_htons(0x1fff)
#define FRAGMENT_MORE bpf_htons(0x2000)
#define VLAN_ID_MASK 0xfff
#define ECN_MASK 3
#define ECN_ECT1 1
#define ECN_ECT0 2
#define ECN_CE 3

/* RFC 792. */
struct icmp_header {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 rest; /* of an echo: identifier and sequence number */
};
#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_REDIRECT 5
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12

/* RFC 7348, section 5. */
struct vxlan_header {
	__be32 flags;
	__be32 vni; /* upper 24 bits */
};
#define VXLAN_FLAG_VNI bpf_htonl(0x08000000)

/* The 50 bytes between the outer and the inner packet. */
struct vxlan_headers4 {
	struct iphdr ip;
	struct udphdr udp;
	struct vxlan_header vxlan;
	struct ethhdr ethernet;
} __attribute__((packed));

enum fragment {
	FRAGMENT_NONE = 0,
	FRAGMENT_FIRST = 1,
	FRAGMENT_LATER = 2,
};

struct packet4 {
	__be32 source;
	__be32 destination;
	__be16 source_port; /* 0 where there is none, and in all fragments but the first */
	__be16 destination_port;
	__u32 length; /* of the IP packet, as its header says */
	__u8 protocol;
	__u8 tos;
	__u8 ttl;
	__u8 header;     /* bytes of the IP header; more than 20 if it has options */
	__u8 fragment;   /* enum fragment */
	__u8 icmp_error; /* carries a packet that it is about */
};

enum parsed {
	PARSED = 0,
	PARSED_MALFORMED = 1, /* shorter than it says, or not readable */
};

static __always_inline void *packet_data(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data;
}

static __always_inline void *packet_end(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data_end;
}

/*
 * skb->gso_size: nonzero for an aggregate. As one instruction of its own, because compilers that find several readings
 * like to compute the field's address once, and the verifier refuses pointers into the middle of the context.
 */
static __always_inline __u32 segment_size(const struct __sk_buff *skb)
{
	__u64 size;

	asm volatile("%[size] = *(u32 *)(%[skb] + %[offset])"
		     : [size] "=r"(size)
		     : [skb] "r"(skb), [offset] "i"(offsetof(struct __sk_buff, gso_size)));
	return size;
}

/*
 * Makes the first `length` bytes readable through packet_data(). An aggregate (GSO) has its headers in the
 * head already; pulling from its fragments breaks its segments on kernels before 6.16.
 */
static __always_inline int make_linear(struct __sk_buff *skb, __u32 length)
{
	if (packet_data(skb) + length <= packet_end(skb))
		return 0;
	if (segment_size(skb) || skb->len < length)
		return -1;
	return bpf_skb_pull_data(skb, length);
}

static __always_inline int is_icmp_error(__u8 type)
{
	return type == ICMP_UNREACHABLE || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT ||
	       type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}

static __always_inline enum fragment fragment_of(const struct iphdr *ip)
{
	if (ip->frag_off & FRAGMENT_OFFSET)
		return FRAGMENT_LATER;
	return ip->frag_off & FRAGMENT_MORE ? FRAGMENT_FIRST : FRAGMENT_NONE;
}

/* Ports, or what stands for them, of the transport header at `offset`. */
static __always_inline enum parsed parse_ports(struct __sk_buff *skb, __u32 offset, struct packet4 *packet)
{
	struct {
		__be16 first;
		__be16 second;
		__be16 third;
	} head;

	switch (packet->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case IPPROTO_UDPLITE:
	case IPPROTO_DCCP:
		if (bpf_skb_load_bytes(skb, offset, &head, 4))
			return PARSED_MALFORMED;
		packet->source_port = head.first;
		packet->destination_port = head.second;
		return PARSED;
	case IPPROTO_ICMP:
		if (bpf_skb_load_bytes(skb, offset, &head, sizeof(head)))
			return PARSED_MALFORMED;
		/* type and code; checksum; identifier */
		__u8 type = bpf_ntohs(head.first) >> 8;
		if (type == ICMP_ECHO || type == ICMP_ECHO_REPLY)
			packet->source_port = packet->destination_port = head.third;
		packet->icmp_error = !packet->fragment && is_icmp_error(type);
		return PARSED;
	}
	return PARSED;
}

/* Reads the IPv4 packet that starts `offset` bytes into the frame; `offset` is a constant. */
static __always_inline enum parsed parse4(struct __sk_buff *skb, __u32 offset, struct packet4 *packet)
{
	struct iphdr *ip;
	__be16 *ports;
	__u32 header, length;

	if (make_linear(skb, offset + sizeof(*ip)))
		return PARSED_MALFORMED;
	ip = packet_data(skb) + offset;
	if ((void *)(ip + 1) > packet_end(skb))
		return PARSED_MALFORMED;
	header = ip->ihl * 4;
	length = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || header < sizeof(*ip))
		return PARSED_MALFORMED;
	/* The length field of an aggregate may be that of one segment, or 0. */
	if (!segment_size(skb) && (length < header || offset + length > skb->len))
		return PARSED_MALFORMED;
	packet->source = ip->saddr;
	packet->destination = ip->daddr;
	packet->source_port = 0;
	packet->destination_port = 0;
	packet->length = length;
	packet->protocol = ip->protocol;
	packet->tos = ip->tos;
	packet->ttl = ip->ttl;
	packet->header = header;
	packet->fragment = fragment_of(ip);
	packet->icmp_error = 0;
	if (packet->fragment == FRAGMENT_LATER)
		return PARSED;
	/* Nearly all have no options, and the ports at hand: no call is needed. */
	ports = (void *)(ip + 1);
	if (header == sizeof(*ip) && (packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP) &&
	    (void *)(ports + 2) <= packet_end(skb)) {
		packet->source_port = ports[0];
		packet->destination_port = ports[1];
		return PARSED;
	}
	return parse_ports(skb, offset + header, packet);
}

/*
 * Bytes of the largest IP packet that this frame becomes on the wire: its own, or of one segment of an
 * aggregate. The IP packet starts `offset` bytes into the frame and has no options.
 */
static __always_inline __u32 wire_length4(struct __sk_buff *skb, __u32 offset, const struct packet4 *packet)
{
	__u8 data_offset;

	if (!segment_size(skb))
		return packet->length;
	if (packet->protocol != IPPROTO_TCP)
		return sizeof(struct iphdr) + sizeof(struct udphdr) + segment_size(skb);
	if (bpf_skb_load_bytes(skb, offset + sizeof(struct iphdr) + 12, &data_offset, 1))
		return ~0U;
	return sizeof(struct iphdr) + (data_offset >> 4) * 4 + segment_size(skb);
}

#endif
