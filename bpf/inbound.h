/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Flows from outside the network to a pod of this node at its own address: of another node's processes where peers
 * are reached without a tunnel, and of whoever else routes to pods.
 *
 * A host that runs Docker has a FORWARD policy that drops them, which flanneld opens with rules of its own. Here the
 * programs let them in past the stack. But then connection tracking does not know them, and a masquerade rule would
 * take a pod's answers for flows that the pod opens: each is noted in inbound4, and its answers go past the stack
 * too. A flow that a pod opened is the stack's in both directions: where it leaves with the pod's address, it is
 * noted in flows4.
 */
#ifndef TWILL_INBOUND_H
#define TWILL_INBOUND_H

#include "masquerade.h"

#define DONT_FRAGMENT bpf_htons(0x4000)

/* What the stack takes for no source at all: 0.0.0.0/8, multicast, broadcast. Its own addresses lead nowhere. */
static __always_inline int may_be_source4(__be32 address)
{
	__u32 block = bpf_ntohl(address) >> 24;

	return block && block < 224;
}

/* The key of the flow that the packet is of, or is about; fragments have their ports in it. */
static __always_inline int inbound_key4(struct flow4 *key, struct __sk_buff *skb,
					const struct packet4 *packet)
{
	struct packet4 whole = *packet;

	if (packet->icmp_error && flow_of_error(skb, ETH_HLEN, &whole))
		return -1;
	whole.fragment = FRAGMENT_NONE;
	flow_key(key, &whole);
	return 0;
}

/*
 * Asks the kernel for the way from a pod to the outside: its answer, and the interface and next hop in `route`. A
 * next hop that still has to say its MAC is one too.
 */
static __noinline long way_out4(struct __sk_buff *skb, const struct packet4 *packet, __be32 pod,
				__be32 remote, struct bpf_fib_lookup *route)
{
	long found;

	route->family = AF_INET;
	route->ipv4_src = pod;
	route->ipv4_dst = remote;
	route->l4_protocol = packet->protocol;
	route->tot_len = wire_length4(skb, ETH_HLEN, packet);
	route->tos = packet->tos & 0x1c;
	route->ifindex = skb->ifindex;
	found = bpf_fib_lookup(skb, route, sizeof(*route), 0);
	if (found == BPF_FIB_LKUP_RET_NO_NEIGH)
		found = BPF_FIB_LKUP_RET_SUCCESS;
	return route->family == AF_INET ? found : BPF_FIB_LKUP_RET_UNSUPP_LWT;
}

/*
 * Whether a flow that begins with this packet may be let in: it is no answer, and the pod's answers will leave where
 * it came in. `tunnel` if it came by the tunnel device, whose peers were checked, and are answered without it.
 */
static __always_inline int may_begin4(struct __sk_buff *skb, const struct packet4 *packet, int tunnel)
{
	struct bpf_fib_lookup route = {};
	__u8 flags = tcp_flags_of(skb, packet);

	if ((flags & TCP_RST) || (flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK) || packet->icmp_error ||
	    is_echo_reply(skb, packet) || !may_be_source4(packet->source))
		return 0;
	if (way_out4(skb, packet, packet->destination, packet->source, &route) != BPF_FIB_LKUP_RET_SUCCESS)
		return 0;
	return tunnel || route.ifindex == skb->ifindex;
}

/* Whether the packet is of a flow that was let in, or may be and now is. Of fragments, not the later ones. */
static __always_inline int is_let_in4(struct __sk_buff *skb, const struct packet4 *packet, int tunnel)
{
	struct inbound *known, row = {};
	struct flow4 key;

	if (inbound_key4(&key, skb, packet))
		return 0;
	known = bpf_map_lookup_elem(&inbound4, &key);
	if (known && (packet->icmp_error || known->ifindex == skb->ifindex))
		return 1;
	if (!may_begin4(skb, packet, tunnel))
		return 0;
	row.since_ns = bpf_ktime_get_ns();
	row.ifindex = skb->ifindex;
	return !bpf_map_update_elem(&inbound4, &key, &row, BPF_ANY);
}

/*
 * Bytes of the largest packet that the pod takes. The end of a veth takes more than its link's MTU, of which the stack
 * would have made fragments, if it may.
 */
static __always_inline __u32 largest_for4(struct __sk_buff *skb, const struct endpoint4 *endpoint)
{
	__be16 flags = DONT_FRAGMENT;

	if (!endpoint)
		return 0xffff;
	if (endpoint->delivery == DELIVERY_PEER)
		bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, frag_off), &flags, sizeof(flags));
	return flags & DONT_FRAGMENT ? endpoint->mtu : 0xffff;
}

/*
 * A packet from outside the network for a pod of this node: hands it over, if nothing but the policy of a chain
 * stands in its way. What is not let in keeps the verdict that the caller gave, unless there is a better one.
 */
static __always_inline int let_in4(struct __sk_buff *skb, const struct packet4 *packet, int tunnel,
				   enum verdict *verdict)
{
	struct endpoint4 *endpoint = endpoint_of4(packet->destination);
	struct packet4 whole = *packet;
	struct datagram4 *datagram;
	struct fragment4 fragment;
	enum verdict why;
	__u16 stamp = skb->tc_index;
	int let_in;

	if (!config.let_in)
		return NEXT;
	/* A flow is kept with its ports here: what one of them sends in fragments says nothing of the others. */
	whole.fragment = FRAGMENT_NONE;
	why = needs_stack4(skb, ETH_HLEN, &whole, largest_for4(skb, endpoint));
	if (packet->fragment && fragment_key4(&fragment, skb, packet))
		return NEXT;
	if (packet->fragment == FRAGMENT_LATER) {
		/* The first one, which has the ports, decides for all; what comes before it waits for it. */
		datagram = datagram_of4(&fragment);
		if (!datagram && why == VERDICT_UNRELATED) {
			if (!hold4(skb, &fragment, packet->length)) {
				*verdict = VERDICT_HELD;
				return DROP;
			}
			datagram = datagram_of4(&fragment);
		}
		let_in = datagram && bytes4(datagram->address);
	} else {
		let_in = why == VERDICT_UNRELATED && is_let_in4(skb, packet, tunnel);
		if (packet->fragment) {
			note_fragments4(&fragment, let_in ? packet->destination : 0);
			/* At the tunnel device they come in again as what they are, checked. */
			if (tunnel)
				skb->tc_index = CHECKED;
			if (release4(skb, &fragment)) {
				*verdict = VERDICT_RELEASED;
				return DROP;
			}
			skb->tc_index = stamp;
		}
	}
	if (why != VERDICT_UNRELATED) {
		*verdict = why;
		return NEXT;
	}
	if (!let_in)
		return NEXT;
	return endpoint ? deliver4(skb, endpoint, VERDICT_DELIVERED, verdict)
			: introduce4(skb, packet, verdict);
}

/* Whether what a pod sends to the outside is of a flow that was let in. */
static __always_inline int is_answer4(struct __sk_buff *skb, const struct packet4 *packet)
{
	struct datagram4 *datagram;
	struct fragment4 fragment;
	struct flow4 key;

	if (packet->fragment && fragment_key4(&fragment, skb, packet))
		return 0;
	if (packet->fragment == FRAGMENT_LATER) {
		datagram = datagram_of4(&fragment);
		return datagram && bytes4(datagram->address) == packet->source;
	}
	if (inbound_key4(&key, skb, packet) || !bpf_map_lookup_elem(&inbound4, &key))
		return 0;
	if (packet->fragment)
		note_fragments4(&fragment, packet->source);
	return 1;
}

/* Sends a pod's answer where the kernel's routes lead, past the rest of the stack. */
static __always_inline int answer4(struct __sk_buff *skb, const struct packet4 *packet, enum verdict *verdict)
{
	struct bpf_redir_neigh next_hop = {};
	struct bpf_fib_lookup route = {};
	struct iphdr *ip;

	*verdict = VERDICT_STACK_OPTIONS;
	if (packet->header != sizeof(*ip))
		return NEXT;
	*verdict = VERDICT_STACK_TTL;
	if (packet->ttl <= 1)
		return NEXT;
	*verdict = VERDICT_STACK_TOO_BIG;
	if (way_out4(skb, packet, packet->source, packet->destination, &route) != BPF_FIB_LKUP_RET_SUCCESS)
		return NEXT;
	ip = packet_data(skb) + ETH_HLEN;
	if ((void *)(ip + 1) > packet_end(skb))
		return NEXT;
	decrement_ttl(ip);
	/* On the way out it is nobody's any more: not changed by the stack, and not to be. */
	skb->tc_index = 0;
	*verdict = VERDICT_ANSWERED;
	next_hop.nh_family = AF_INET;
	next_hop.ipv4_nh = route.ipv4_dst;
	return bpf_redirect_neigh(route.ifindex, &next_hop, sizeof(next_hop), 0);
}

/*
 * For to_net: a pod's packet leaves the stack for the outside with the pod's own address. Unless it is an answer,
 * the pod has opened the flow, and what comes back belongs to the stack, which may have translated its other end.
 */
static __always_inline void note_opened4(struct __sk_buff *skb, const struct packet4 *packet)
{
	struct packet4 whole = *packet;
	struct flow4 key;

	if (!config.let_in || !watches_flows() || packet->icmp_error || packet->fragment == FRAGMENT_LATER)
		return;
	whole.fragment = FRAGMENT_NONE;
	flow_key(&key, &whole);
	if (bpf_map_lookup_elem(&inbound4, &key))
		return;
	keep_on_stack(&key);
}

#endif
