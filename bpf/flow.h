/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The slow path decides, the fast path repeats. A flow whose addresses the stack changes (a service, a
 * published port) must pass the stack in both directions, else its replies are not changed back. Such a flow
 * shows itself where it leaves the stack: with addresses under which no program saw it enter. There it is
 * noted in flows4, and from then on the fast lane leaves it alone.
 *
 * To tell what entered from what the stack made, a program that passes a packet on stamps it with a hash of
 * its addresses (skb->tc_index, which the stack carries along and does not use); where the packet leaves, the
 * stamp fits, or the stack translated it. A reassembled packet has the stamp of its first fragment, which
 * knows the ports.
 */
#ifndef TWILL_FLOW_H
#define TWILL_FLOW_H

#include "maps.h"
#include "parse.h"
#include "event.h"

/*
 * skb->tc_index of what came from a pod or from the network and was not checked as a tunnel packet.
 * If the kernel's tunnel device opens it nevertheless, it was sent past the checks. No stamp is
 * even, and no filter's class is this large by chance.
 */
#define UNCHECKED 0x7490
/* The same of a tunnel packet that was checked and left to the device. */
#define CHECKED 0x7492
/* The same of an answer that was given back the address of who had asked, outside the network. */
#define GIVEN_BACK 0x7494

/* Spreads the packet's addresses over 32 bits; directed, and the same for all packets of a flow. */
static __always_inline __u32 flow_hash(const struct packet4 *packet, __u32 ports)
{
	__u32 hash = packet->source;

	hash = (hash ^ (hash >> 16)) * 0x7feb352d;
	hash ^= packet->destination;
	hash = (hash ^ (hash >> 15)) * 0x846ca68b;
	hash ^= ports + packet->protocol;
	hash = (hash ^ (hash >> 16)) * 0x7feb352d;
	return hash ^ (hash >> 15);
}

static __always_inline __u32 flow_ports(const struct packet4 *packet)
{
	return ((__u32)packet->source_port << 16) | packet->destination_port;
}

static __always_inline __u16 flow_stamp(const struct packet4 *packet)
{
	return (__u16)flow_hash(packet, flow_ports(packet)) | 1;
}

/* The key of the packet's flow; fragments have no ports in it, so that all of a packet take one way. */
static __always_inline void flow_key(struct flow4 *key, const struct packet4 *packet)
{
	__be16 source_port = packet->fragment ? 0 : packet->source_port;
	__be16 destination_port = packet->fragment ? 0 : packet->destination_port;
	__be32 low, high;
	int swap = bpf_ntohl(packet->source) > bpf_ntohl(packet->destination) ||
		   (packet->source == packet->destination &&
		    bpf_ntohs(source_port) > bpf_ntohs(destination_port));

	low = swap ? packet->destination : packet->source;
	high = swap ? packet->source : packet->destination;
	__builtin_memset(key, 0, sizeof(*key));
	__builtin_memcpy(key->a, &low, sizeof(low));
	__builtin_memcpy(key->b, &high, sizeof(high));
	key->port_a = swap ? destination_port : source_port;
	key->port_b = swap ? source_port : destination_port;
	key->protocol = packet->protocol;
}

/* The flow that an ICMP error at `offset` is about, in `packet`'s place. */
static __always_inline int flow_of_error(struct __sk_buff *skb, __u32 offset, struct packet4 *packet)
{
	struct iphdr ip;
	__u32 inner = offset + sizeof(struct iphdr) + sizeof(struct icmp_header);

	if (bpf_skb_load_bytes(skb, inner, &ip, sizeof(ip)))
		return -1;
	if (ip.version != 4 || ip.ihl != 5)
		return -1;
	packet->source = ip.saddr;
	packet->destination = ip.daddr;
	packet->protocol = ip.protocol;
	packet->fragment = fragment_of(&ip);
	packet->source_port = packet->destination_port = 0;
	if (packet->fragment == FRAGMENT_LATER)
		return 0;
	return parse_ports(skb, inner + sizeof(ip), packet) == PARSED ? 0 : -1;
}

/*
 * Whether the stack must see this packet because it translates the packet's flow. `offset` is that of the IP
 * header.
 */
static __always_inline int flow_is_on_stack(struct __sk_buff *skb, __u32 offset, const struct packet4 *packet)
{
	struct packet4 about = *packet;
	struct flow4 key;

	if (packet->icmp_error && flow_of_error(skb, offset, &about))
		return 1;
	flow_key(&key, &about);
	return bpf_map_lookup_elem(&flows4, &key) != 0;
}

/* Nonzero if it was not yet. The row is looked up first, which also keeps it from becoming the least recently used. */
static __always_inline int keep_on_stack(const struct flow4 *key)
{
	struct flow flow = {};

	if (bpf_map_lookup_elem(&flows4, key))
		return 0;
	flow.since_ns = bpf_ktime_get_ns();
	bpf_map_update_elem(&flows4, key, &flow, BPF_ANY);
	return 1;
}

/*
 * For the hooks where packets leave the stack: keeps the flow of a packet that the stack translated there. A
 * second row, without ports, stands for the flow's fragments. The first fragment speaks for the others.
 */
static __always_inline void note_leaving(struct __sk_buff *skb, enum hook hook, const struct packet4 *packet)
{
	struct packet4 whole = *packet;
	struct flow4 key;

	if (packet->icmp_error || packet->fragment == FRAGMENT_LATER || skb->tc_index == flow_stamp(packet))
		return;
	whole.fragment = FRAGMENT_NONE;
	flow_key(&key, &whole);
	if (keep_on_stack(&key))
		report(skb, hook, VERDICT_STACK_FLOW);
	if (!key.port_a && !key.port_b)
		return;
	key.port_a = key.port_b = 0;
	keep_on_stack(&key);
}

#endif
