// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * The programs. Each looks at one packet at one hook, decides, counts the verdict and returns.
 *
 *   pod -> from_pod -> uplink                    pods' packets, past the stack
 *          stack -> to_overlay -> uplink         the node's own, and translated ones
 *   uplink -> from_net -> pod                    opened here, or arrived without a tunnel
 *             stack -> from_overlay -> pod       opened by the kernel's device, or by from_net for the stack
 *   stack -> to_pod, to_net                      only watch what the stack sends
 *
 * The kernel's own routes, neighbours and devices are complete beneath: any packet may be passed on.
 */
#include "abi.h"
#include "maps.h"
#include "parse.h"
#include "event.h"
#include "flow.h"
#include "forward.h"
#include "plain.h"
#include "masquerade.h"
#include "inbound.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Enums that no map's type mentions, so that BTF keeps them. */
const volatile struct {
	enum limit limit;
	enum hook hook;
	enum verdict verdict;
} abi = {};

/* And what the ring of events holds. */
const struct event *const volatile event = 0;

/*
 * A pod that sends to the tunnel's port of a node could put packets into the cluster under any name: the
 * tunnel knows its peers by their address, and the stack may lend the pod this node's.
 */
static __always_inline int is_pod_tunnel4(const struct packet4 *packet)
{
	return is_for_tunnel_port(packet) &&
	       (packet->destination == config.vtep4 || is_peer4(packet->destination));
}

/* Sends a pod's packet to the peer that holds its destination. */
static __always_inline int send_to_peer4(struct __sk_buff *skb, const struct peer4 *peer,
					 const struct packet4 *packet, enum verdict *verdict)
{
	struct iphdr *ip = packet_data(skb) + ETH_HLEN;

	/* The maps may be ahead of the programs. */
	*verdict = VERDICT_STACK_OFF;
	if (peer->reach == REACH_DIRECT ? !config.direct : !config.tunnel)
		return NEXT;
	if ((void *)(ip + 1) > packet_end(skb))
		return NEXT;
	decrement_ttl(ip);
	if (peer->reach == REACH_DIRECT) {
		*verdict = VERDICT_ROUTED;
		return send_to_neighbour4(peer);
	}
	if (is_plain_tunnel())
		return encapsulate_plain4(skb, peer, packet, 0, verdict);
	if (config.encapsulate && peer->reach == REACH_TUNNEL) {
		int action = encapsulate4(skb, peer, packet, verdict);

		if (*verdict != VERDICT_DEVICE)
			return action;
	}
	return send_to_device4(skb, peer, verdict);
}

/* `before` is skb->tc_index as this packet brought it. */
static __always_inline int from_pod4(struct __sk_buff *skb, struct packet4 *packet, __u16 before,
				     enum verdict *verdict)
{
	struct ethhdr *ethernet;
	struct interface *interface = 0;
	struct endpoint4 *sender;
	const __u8 *gateway_mac;
	struct peer4 *peer;
	__u32 ifindex = skb->ifindex;
	int outside;

	if (is_pod_tunnel4(packet)) {
		*verdict = VERDICT_DROP_POD_TUNNEL;
		return DROP;
	}
	*verdict = VERDICT_UNRELATED;
	outside = !in_network4(packet->destination);
	if (skb->vlan_present || (outside && !config.masquerade && !config.let_in) ||
	    !is_local_pod4(packet->source))
		return NEXT;
	/* Only what is addressed to the gateway is routed; the rest goes from port to port of the bridge. */
	sender = endpoint_of4(packet->source);
	if (sender && sender->ifindex == ifindex) {
		gateway_mac = sender->gateway_mac;
	} else {
		interface = bpf_map_lookup_elem(&interfaces, &ifindex);
		if (!interface)
			return NEXT;
		gateway_mac = interface->gateway_mac;
	}
	ethernet = packet_data(skb);
	if ((void *)(ethernet + 1) > packet_end(skb) || !same_mac(ethernet->h_dest, gateway_mac))
		return NEXT;
	/*
	 * On the bridge itself the stack may already have translated it (br_netfilter), and the replies to what
	 * is sent from another interface than its own would not come back there. Such a packet keeps the stamp
	 * that it got at its port, and without one counts as translated. A sender not known yet is a pod that
	 * just started: its very first packet must not lose its address to a masquerade rule of the stack.
	 */
	if (sender ? sender->ifindex != ifindex : interface && interface->bridge) {
		*verdict = VERDICT_STACK_LOCAL;
		if (before && !is_for_tunnel_port(packet))
			skb->tc_index = before;
		return NEXT;
	}
	stamp(skb, packet);
	if (outside) {
		struct repeat4 repeat = {};
		int may_repeat = config.masquerade && may_repeat4(skb, packet, &repeat);

		/* What went out under our address a moment ago is no answer; to ask for that costs a third of a packet. */
		if (!repeat.connection && config.let_in && is_answer4(skb, packet))
			return answer4(skb, packet, verdict);
		return may_repeat ? repeat4(skb, packet, &repeat, verdict) : NEXT;
	}

	if ((packet->destination & config.subnet4_mask) == config.subnet4) {
		struct endpoint4 *endpoint = endpoint_of4(packet->destination);

		*verdict = VERDICT_STACK_LOCAL;
		if (!endpoint || endpoint->ifindex == ifindex)
			return NEXT;
		*verdict = needs_stack4(skb, ETH_HLEN, packet, endpoint->mtu);
		if (*verdict != VERDICT_UNRELATED)
			return NEXT;
		return deliver4(skb, endpoint, VERDICT_DELIVERED, verdict);
	}

	*verdict = VERDICT_STACK_NO_PEER;
	peer = peer_of4(packet->destination);
	if (!peer)
		return NEXT;
	*verdict = needs_stack4(skb, ETH_HLEN, packet, peer->mtu);
	if (*verdict != VERDICT_UNRELATED)
		return NEXT;
	return send_to_peer4(skb, peer, packet, verdict);
}

/* Ingress of what pods are behind: bridge ports, point-to-point interfaces, and the bridge itself. */
SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	enum verdict verdict = VERDICT_UNRELATED;
	__u32 bytes = skb->len;
	struct packet4 packet;
	__u16 before = skb->tc_index;
	int action = NEXT;

	skb->tc_index = UNCHECKED;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (parse4(skb, ETH_HLEN, &packet) == PARSED)
			action = from_pod4(skb, &packet, before, &verdict);
		else
			verdict = VERDICT_STACK_MALFORMED;
	}
	count(skb, HOOK_FROM_POD, verdict, bytes);
	return action;
}

/* Egress towards pods: what the stack hands to them. */
SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	struct packet4 packet;

	if (watches_flows() && skb->protocol == bpf_htons(ETH_P_IP) &&
	    parse4(skb, ETH_HLEN, &packet) == PARSED && is_local_pod4(packet.destination) &&
	    (is_local_pod4(packet.source) || peer_of4(packet.source)))
		note_leaving(skb, HOOK_TO_POD, &packet);
	count(skb, HOOK_TO_POD, VERDICT_UNRELATED, skb->len);
	return NEXT;
}

/*
 * What the stack sends from outside the network to a pod of a peer, by the tunnel device or without a tunnel, gets this
 * node's address; ICMP errors about such a flow belong to it.
 */
static __always_inline int lend_address4(struct __sk_buff *skb, const struct packet4 *packet,
					 enum verdict *verdict)
{
	if (packet->icmp_error)
		return error_to_outside4(skb, packet, verdict);
	return to_outside4(skb, packet, verdict);
}

/* Egress of the kernel's tunnel device: what the stack sends to peers. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	enum verdict verdict = VERDICT_UNRELATED;
	__u32 bytes = skb->len;
	struct ethhdr *ethernet;
	struct packet4 packet;
	struct peer4 *peer = 0;
	int action = NEXT;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		goto out;
	verdict = VERDICT_STACK_MALFORMED;
	if (parse4(skb, ETH_HLEN, &packet) != PARSED)
		goto out;
	verdict = VERDICT_STACK_NO_PEER;
	peer = peer_of4(packet.destination);
	if (!peer)
		goto out;
	if (watches_flows() && is_local_pod4(packet.source))
		note_leaving(skb, HOOK_TO_OVERLAY, &packet);
	if (config.masquerade && (packet.icmp_error || !in_network4(packet.source))) {
		verdict = VERDICT_UNRELATED;
		action = lend_address4(skb, &packet, &verdict);
		if (action != NEXT)
			goto out;
	}
	if (is_plain_tunnel()) {
		action = encapsulate_plain4(skb, peer, &packet, awaits_neighbour4(skb, peer), &verdict);
		goto out;
	}
	verdict = VERDICT_DEVICE;
	ethernet = packet_data(skb);
	if (!config.encapsulate || peer->reach != REACH_TUNNEL || (void *)(ethernet + 1) > packet_end(skb) ||
	    !same_mac(ethernet->h_dest, peer->vtep_mac) || awaits_neighbour4(skb, peer))
		goto out;
	action = encapsulate4(skb, peer, &packet, &verdict);
out:
	/* What these programs encapsulate is counted there. */
	if (config.count_peers && peer && verdict == VERDICT_DEVICE)
		add_to_peer(bytes4(peer->public_ip), SENT, bytes);
	skb->tc_index = 0;
	count(skb, HOOK_TO_OVERLAY, verdict, bytes);
	return action;
}

/*
 * Ingress of the kernel's tunnel device: what it opened. What a pod sent to it, or the network to another
 * address of this node than the tunnel's, is marked, and so is what from_net has checked, where it is attached.
 */
SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	enum verdict verdict = VERDICT_UNRELATED;
	__u32 bytes = skb->len;
	struct endpoint4 *endpoint;
	struct packet4 packet;
	__u16 before = skb->tc_index;
	int action = NEXT;

	if (before == UNCHECKED) {
		verdict = VERDICT_DROP_FORGED;
		action = DROP;
		goto out;
	}
	skb->tc_index = 0;
	if (skb->protocol != bpf_htons(ETH_P_IP))
		goto out;
	verdict = VERDICT_STACK_MALFORMED;
	if (parse4(skb, ETH_HLEN, &packet) != PARSED)
		goto out;
	if (before != CHECKED && !peer_of4(packet.source) && !is_peer4(packet.source)) {
		verdict = VERDICT_DROP_FORGED;
		action = DROP;
		goto out;
	}
	stamp(skb, &packet);
	if (config.masquerade && packet.destination == config.subnet4 && skb->pkt_type == PACKET_HOST) {
		verdict = VERDICT_STACK_LOCAL;
		action = from_outside4(skb, &packet, &verdict);
		goto out;
	}
	/* What a pod sends to a node's own address goes by the stack, and so must the answers: it follows both. What that
	 * node begins itself may be let in. */
	verdict = VERDICT_STACK_FLOW;
	if (!in_network4(packet.source)) {
		if (skb->pkt_type == PACKET_HOST && is_local_pod4(packet.destination))
			action = let_in4(skb, &packet, 1, &verdict);
		goto out;
	}
	verdict = VERDICT_STACK_LOCAL;
	endpoint = endpoint_of4(packet.destination);
	if (endpoint && skb->pkt_type == PACKET_HOST)
		verdict = needs_stack4(skb, ETH_HLEN, &packet, endpoint->mtu);
	if (endpoint && verdict == VERDICT_UNRELATED)
		action = deliver4(skb, endpoint, VERDICT_DELIVERED, &verdict);
	else if (!endpoint && skb->pkt_type == PACKET_HOST)
		action = introduce4(skb, &packet, &verdict);
out:
	count(skb, HOOK_FROM_OVERLAY, verdict, bytes);
	return action;
}

/* Where the inner IP header is in a tunnel packet without outer options. */
#define INNER_IP (ETH_HLEN + sizeof(struct vxlan_headers4))

/* Opens the tunnel packet and hands what is in it to a pod. */
static __always_inline int decapsulate4(struct __sk_buff *skb, const struct endpoint4 *endpoint,
					__u8 outer_tos, const struct packet4 *inner, enum verdict *verdict)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	int ecn = ecn_decapsulate(outer_tos, inner->tos);
	struct iphdr *ip;

	if (ecn < 0) {
		*verdict = VERDICT_DROP_ECN;
		return DROP;
	}
	*verdict = VERDICT_STACK_TUNNEL;
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(struct vxlan_headers4), BPF_ADJ_ROOM_MAC, flags))
		return NEXT;
	*verdict = VERDICT_DROP_FAILED;
	/* The network card vouched for the outer checksum, not for the inner one. */
	if (bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC) < 0)
		return DROP;
	if (ecn != (inner->tos & ECN_MASK)) {
		ip = packet_data(skb) + ETH_HLEN;
		if ((void *)(ip + 1) > packet_end(skb))
			return DROP;
		set_ecn(ip, inner->tos, ecn);
	}
	stamp(skb, inner);
	return deliver4(skb, endpoint, VERDICT_DECAPSULATED, verdict);
}

/* What follows the outer IP header of a tunnel packet. */
struct tunnel_headers4 {
	struct udphdr udp;
	struct vxlan_header vxlan;
	struct ethhdr ethernet;
	struct iphdr ip;
} __attribute__((packed));

/* Whether a tunnel packet with these headers may come from that outer source. */
static __always_inline enum verdict check_tunnel4(const struct tunnel_headers4 *headers, __be32 outer)
{
	struct subnet4 *held = bpf_map_lookup_elem(&peers4, &outer);
	int is_ip = headers->ethernet.h_proto == bpf_htons(ETH_P_IP);

	if (is_ip && is_source_of4(headers->ip.saddr, outer, held))
		return VERDICT_STACK_TUNNEL;
	if (!held)
		return VERDICT_DROP_UNKNOWN_PEER;
	/* RFC 7348, section 6.1: no tags inside; the kernel would take one off and not look at it. */
	if (is_ip || headers->ethernet.h_proto == bpf_htons(ETH_P_8021Q) ||
	    headers->ethernet.h_proto == bpf_htons(ETH_P_8021AD))
		return VERDICT_DROP_FORGED;
	return VERDICT_STACK_TUNNEL;
}

/* Where is noted when packets from this outer port, which a flow keeps, were left to the kernel's device. */
static __always_inline struct in_device *in_device_of(const struct packet4 *outer)
{
	__u32 index = bpf_ntohs(outer->source_port) & (IN_DEVICE_MAX - 1);

	return bpf_map_lookup_elem(&in_device4, &index);
}

/* Notes that a tunnel packet in order is left to the kernel's device. What comes behind it soon must not overtake it. */
static __always_inline void note_left_to_device(const struct packet4 *outer)
{
	struct in_device *device = in_device_of(outer);
	__u32 tick = bpf_jiffies64();

	/* Processors share it: it is written once a tick. */
	if (device && device->tick != tick)
		device->tick = tick;
}

/*
 * Whether a TCP segment, no aggregate itself, may be opened here. TCP arrives in aggregates, which the kernel's device
 * opens and makes larger, in a queue of its own; all of a flow must take one way while there is anything in it, or its
 * segments change order. A segment that only acknowledges may overtake others: what it says is not new if it comes late,
 * and what it acknowledges went the other way. And one that ends what was to be said at a time (the kernel would make no
 * aggregate of it and what comes after) finds the queue empty, if none of its flow was left to the device in the tick
 * that runs and the one before: it is emptied behind each batch of packets that the interface hands on. At constant
 * `offset` is the segment's IP header.
 */
static __always_inline int may_open_tcp4(struct __sk_buff *skb, __u32 offset, const struct packet4 *outer,
					 const struct packet4 *packet)
{
	struct in_device *device;
	__u8 head[2]; /* length, flags */

	if (packet->header != sizeof(struct iphdr) || packet->fragment ||
	    bpf_skb_load_bytes(skb, offset + sizeof(struct iphdr) + TCP_LENGTH, head, sizeof(head)))
		return 0;
	if (packet->length == sizeof(struct iphdr) + (head[0] >> 4) * 4 && (head[1] & ~TCP_ECE) == TCP_ACK)
		return 1;
	if ((head[1] & TCP_URG) || !(head[1] & (TCP_PSH | TCP_SYN | TCP_FIN | TCP_RST)))
		return 0;
	device = in_device_of(outer);
	return device && (__s32)((__u32)bpf_jiffies64() - device->tick) >= IN_DEVICE_TICKS;
}

/*
 * A UDP packet for the tunnel's port of this node. Those with IP options, and the first part of fragmented
 * ones, are the kernel's to open, but only from a peer; without its first part none of the rest is put
 * together. `before` is skb->tc_index as this packet brought it.
 */
static __always_inline int from_tunnel4(struct __sk_buff *skb, const struct packet4 *outer, __u16 before,
					enum verdict *verdict)
{
	struct tunnel_headers4 headers;
	struct endpoint4 *endpoint;
	struct packet4 inner;
	struct iphdr *ip;
	__u32 start = ETH_HLEN + outer->header;
	int complete = 1;

	/* Straight from the packet where that can be: most of what follows is then never copied. */
	if (outer->header == sizeof(*ip) && !make_linear(skb, INNER_IP + sizeof(*ip)) &&
	    packet_data(skb) + INNER_IP + sizeof(*ip) <= packet_end(skb))
		headers = *(struct tunnel_headers4 *)(packet_data(skb) + ETH_HLEN + sizeof(*ip));
	else
		complete = !bpf_skb_load_bytes(skb, start, &headers, sizeof(headers));

	*verdict = VERDICT_DROP_MALFORMED;
	if (!complete && bpf_skb_load_bytes(skb, start, &headers, offsetof(struct tunnel_headers4, ethernet)))
		return DROP;
	/*
	 * Another network's: its own programs, or its device, know what to do with it. They may have checked it
	 * before us.
	 */
	if ((headers.vxlan.vni & bpf_htonl(0xffffff00)) != bpf_htonl(config.vni << 8)) {
		skb->tc_index = before;
		*verdict = VERDICT_UNRELATED;
		return NEXT;
	}
	if (!complete)
		return DROP;
	*verdict = check_tunnel4(&headers, outer->source);
	if (*verdict != VERDICT_STACK_TUNNEL)
		return DROP;
	skb->tc_index = CHECKED;
	count_peer(outer->source, RECEIVED, skb->len - start - offsetof(struct tunnel_headers4, ethernet));

	/* Aggregates too: what they were made of only the kernel knows. */
	if (!config.decapsulate || outer->fragment || outer->header != sizeof(*ip) || segment_size(skb) ||
	    headers.vxlan.flags != VXLAN_FLAG_VNI || headers.ethernet.h_proto != bpf_htons(ETH_P_IP) ||
	    !is_vtep_mac(headers.ethernet.h_dest))
		return NEXT;
	*verdict = VERDICT_DROP_MALFORMED;
	if (parse4(skb, INNER_IP, &inner) != PARSED || inner.length + INNER_IP - ETH_HLEN > outer->length)
		return DROP;
	*verdict = VERDICT_STACK_TUNNEL;
	if (inner.protocol == IPPROTO_TCP && !may_open_tcp4(skb, INNER_IP, outer, &inner))
		return NEXT;
	/* What the kernel would find wrong with the outer headers is for it to find. */
	ip = packet_data(skb) + ETH_HLEN;
	if ((void *)(ip + 1) > packet_end(skb) || header_checksum(ip) ||
	    bpf_ntohs(headers.udp.len) + sizeof(*ip) != outer->length)
		return NEXT;
	endpoint = endpoint_of4(inner.destination);
	if (!endpoint || !in_network4(inner.source) ||
	    needs_stack4(skb, INNER_IP, &inner, endpoint->mtu) != VERDICT_UNRELATED)
		return NEXT;
	return decapsulate4(skb, endpoint, outer->tos, &inner, verdict);
}

/* A packet from a peer that reaches us without a tunnel. */
static __always_inline int from_direct4(struct __sk_buff *skb, const struct packet4 *packet,
					enum verdict *verdict)
{
	struct peer4 *peer = peer_of4(packet->source);
	struct endpoint4 *endpoint;

	*verdict = VERDICT_UNRELATED;
	/* From another side than its peer's, the stack decides (rp_filter). */
	if (!peer || !is_plain_way4(skb, peer))
		return NEXT;
	stamp(skb, packet);
	endpoint = endpoint_of4(packet->destination);
	if (!endpoint)
		return introduce4(skb, packet, verdict);
	*verdict = needs_stack4(skb, ETH_HLEN, packet, endpoint->mtu);
	if (*verdict != VERDICT_UNRELATED)
		return NEXT;
	return deliver4(skb, endpoint, VERDICT_DELIVERED, verdict);
}

/* A packet for a pod of this node that arrives without a tunnel. */
static __always_inline int to_own_pod4(struct __sk_buff *skb, const struct packet4 *packet,
				       enum verdict *verdict)
{
	if (in_network4(packet->source))
		return config.direct ? from_direct4(skb, packet, verdict) : NEXT;
	if (config.masquerade)
		note_inbound4(skb, packet);
	return let_in4(skb, packet, 0, verdict);
}

/* Ingress of the uplink. */
SEC("tc")
int from_net(struct __sk_buff *skb)
{
	enum verdict verdict = VERDICT_UNRELATED;
	__u32 bytes = skb->len;
	__u16 before = skb->tc_index;
	struct packet4 packet;
	int action = NEXT;

	/* The programs of another network may have checked it before us. No other mark is to be believed. */
	skb->tc_index = before == CHECKED ? CHECKED : UNCHECKED;
	/* A packet of VLAN 0 is one without VLAN; the others are for interfaces of their own. */
	if (skb->vlan_present && ((skb->vlan_tci & VLAN_ID_MASK) || bpf_skb_vlan_pop(skb)))
		goto out;
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type != PACKET_HOST)
		goto out;
	if (parse4(skb, ETH_HLEN, &packet) != PARSED) {
		verdict = VERDICT_STACK_MALFORMED;
		goto out;
	}
	count_direct4(skb, packet.source, RECEIVED);
	if (is_for_tunnel_port(&packet) && packet.destination == config.vtep4) {
		if (is_plain_tunnel()) {
			action = from_plain4(skb, &packet, &verdict);
			goto out;
		}
		if (config.masquerade && packet.fragment && gather4(skb, &packet, 0)) {
			verdict = VERDICT_RELEASED;
			action = DROP;
			goto out;
		}
		action = from_tunnel4(skb, &packet, before, &verdict);
		if (config.decapsulate && verdict == VERDICT_STACK_TUNNEL)
			note_left_to_device(&packet);
	} else if (is_local_pod4(packet.destination)) {
		action = to_own_pod4(skb, &packet, &verdict);
	} else if (config.masquerade) {
		action = from_outside4(skb, &packet, &verdict);
		/* A pod of a peer that speaks to us under its own address, and is answered from ours. */
		if (verdict == VERDICT_UNRELATED && in_network4(packet.source) &&
		    packet.protocol != IPPROTO_TCP)
			note_inbound4(skb, &packet);
	}
out:
	count(skb, HOOK_FROM_NET, verdict, bytes);
	return action;
}

/* Whether a packet that leaves by an uplink can be from or to a pod: the node's own cost no more than this. */
static __always_inline int may_be_pods(struct __sk_buff *skb)
{
	struct iphdr *ip = packet_data(skb) + ETH_HLEN;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return 0;
	if ((void *)(ip + 1) > packet_end(skb))
		return 1;
	return in_network4(ip->saddr) ||
	       (config.masquerade && (ip->protocol == IPPROTO_ICMP || in_network4(ip->daddr)));
}

/* Egress of an uplink: what the stack sends to the outside, and to peers without a tunnel. */
SEC("tc")
int to_net(struct __sk_buff *skb)
{
	enum verdict verdict = VERDICT_UNRELATED;
	__u32 bytes = skb->len;
	struct packet4 packet;
	__be32 destination;
	int action = NEXT;

	if (config.count_peers && config.direct && skb->protocol == bpf_htons(ETH_P_IP) &&
	    !bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, daddr), &destination,
				sizeof(destination)))
		count_direct4(skb, destination, SENT);
	if ((!config.masquerade && !config.let_in && !(config.direct && watches_flows())) ||
	    !may_be_pods(skb) || parse4(skb, ETH_HLEN, &packet) != PARSED)
		goto out;
	if (config.masquerade && packet.icmp_error) {
		action = error_to_outside4(skb, &packet, &verdict);
		goto out;
	}
	if (!in_network4(packet.source)) {
		if (config.masquerade && config.direct && peer_of4(packet.destination))
			action = lend_address4(skb, &packet, &verdict);
		goto out;
	}
	if (skb->tc_index == GIVEN_BACK)
		goto out;
	if (!in_network4(packet.destination)) {
		if (config.masquerade)
			action = to_outside4(skb, &packet, &verdict);
		if (is_local_pod4(packet.source) && verdict == VERDICT_UNRELATED)
			note_opened4(skb, &packet);
	} else if (config.direct && watches_flows() && is_local_pod4(packet.source) &&
		   peer_of4(packet.destination)) {
		note_leaving(skb, HOOK_TO_NET, &packet);
	}
out:
	count(skb, HOOK_TO_NET, verdict, bytes);
	return action;
}

/*
 * Run once by the control plane, not attached: begins the sweep of connections, which then keeps itself going for as
 * long as the maps are pinned. Programs that replace others run it again, and the sweep goes on with their code.
 */
SEC("tc")
int expire(struct __sk_buff *skb)
{
	__u32 only = 0;
	struct expiry *state = bpf_map_lookup_elem(&expiry, &only);

	if (!state || !config.masquerade)
		return 1;
	/* One that is there already is as good. */
	bpf_timer_init(&state->timer, &expiry, CLOCK_MONOTONIC);
	if (bpf_timer_set_callback(&state->timer, sweep))
		return 1;
	if (!state->round)
		state->round = 1;
	return bpf_timer_start(&state->timer, 0, 0) ? 1 : 0;
}

/* Run by the control plane on rows of a former table, each a key and a value, behind RESTORE_START bytes. */
SEC("tc")
int restore(struct __sk_buff *skb)
{
	for (int i = 0; i < RESTORE_STEP; i++)
		if (!restore_next4(skb, RESTORE_START + i * sizeof(struct saved4)))
			break;
	return 0;
}
