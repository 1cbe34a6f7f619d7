/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * What the programs do with a packet once they know what it is: look up where it goes, change it, send it.
 * Each function that sends returns the program's return code and sets the verdict. Until the first change of
 * a packet every failure leaves it to the stack; after that it is dropped and counted.
 *
 * Pointers into the packet are taken anew after every helper that may move it.
 */
#ifndef TWILL_FORWARD_H
#define TWILL_FORWARD_H

#include "maps.h"
#include "parse.h"
#include "event.h"
#include "flow.h"

/* Not in the UAPI headers of every distribution: go on with the next program, or with the stack. */
#define NEXT (-1)
#define DROP 2 /* TC_ACT_SHOT */

#ifndef BPF_F_ADJ_ROOM_ENCAP_L2_ETH
#define BPF_F_ADJ_ROOM_ENCAP_L2_ETH (1ULL << 6)
#endif

#define PACKET_HOST 0
#define AF_INET 2

const volatile struct config config = {};

/* The first of the drops, which are the last in the list. */
#define FIRST_DROP VERDICT_DROP_UNKNOWN_PEER

static __always_inline void count(struct __sk_buff *skb, enum hook hook, enum verdict verdict, __u32 bytes)
{
	__u32 only = 0;
	struct hook_counts *hooks = bpf_map_lookup_elem(&counters, &only);
	__u64 index = (__u32)verdict;
	struct count *cell;

	if (!hooks)
		return;
	/* The register that is compared is the one that is used, or the verifier does not see the bound. */
	asm volatile("" : "+r"(index));
	/* What is not dropped costs no more than the check that the verifier wants to see in any case. */
	if (index >= FIRST_DROP) {
		if (index >= VERDICT_COUNT)
			return;
		report(skb, hook, index);
	}
	cell = (struct count *)hooks + hook * VERDICT_COUNT + index;
	cell->packets++;
	cell->bytes += bytes;
}

/* Not inlined: with the switch off, no more of it is left in a program than where it is called from. */
static __noinline void add_to_peer(__be32 peer, int received, __u32 bytes)
{
	struct traffic *traffic = bpf_map_lookup_elem(&traffic4, &peer);
	struct traffic none = {};
	struct count *cell;

	if (!traffic) {
		/* Another processor may be quicker; a row for all of them is what counts. */
		bpf_map_update_elem(&traffic4, &peer, &none, BPF_NOEXIST);
		traffic = bpf_map_lookup_elem(&traffic4, &peer);
		if (!traffic)
			return;
	}
	cell = received ? &traffic->received : &traffic->sent;
	cell->packets++;
	cell->bytes += bytes;
}

/*
 * Counts a packet that goes to or comes from the node with this address, which is a peer, if that is asked for. `bytes`
 * are those of the frame without its tunnel.
 */
static __always_inline void count_peer(__be32 peer, const int received, __u32 bytes)
{
	if (config.count_peers)
		add_to_peer(peer, received, bytes);
}

#define SENT 0
#define RECEIVED 1

/* Whether it matters which flows the stack translates. */
static __always_inline int watches_flows(void)
{
	return config.fast_path == FAST_PATH_AUTO || config.fast_path == FAST_PATH_STACK;
}

static __always_inline int in_network4(__be32 address)
{
	return (address & config.network4_mask) == config.network4;
}

/* A pod of this node: not the subnet's first two addresses, which are the node's own. */
static __always_inline int is_local_pod4(__be32 address)
{
	return (address & config.subnet4_mask) == config.subnet4 && address != config.subnet4 &&
	       address != (config.subnet4 | bpf_htonl(1));
}

static __always_inline __be32 bytes4(const __u8 address[4])
{
	__be32 value;

	__builtin_memcpy(&value, address, sizeof(value));
	return value;
}

static __always_inline struct peer4 *peer_of4(__be32 address)
{
	struct subnet4 key;

#pragma unroll
	for (int i = 0; i < SUBNET_LENGTHS_MAX; i++) {
		__u32 length = config.subnet_lengths[i];
		__be32 masked;
		struct peer4 *peer;

		if (!length)
			return 0;
		masked = address & bpf_htonl(~0U << ((32 - length) & 31));
		__builtin_memcpy(key.address, &masked, sizeof(masked));
		key.prefix_length = length;
		peer = bpf_map_lookup_elem(&subnets4, &key);
		if (peer)
			return peer;
	}
	return 0;
}

/*
 * Whether what travels between us and this peer without a tunnel does so by this interface, on a network we share. It may,
 * though our own packets for the peer take the tunnel: of two nodes whose way to each other changes, one is the first.
 */
static __always_inline int is_plain_way4(const struct __sk_buff *skb, const struct peer4 *peer)
{
	return peer->ifindex == skb->ifindex && bytes4(peer->next_hop) == bytes4(peer->public_ip);
}

/* Counts a packet that goes to, or comes from, a peer's subnet by this interface without a tunnel. */
static __always_inline void count_direct4(struct __sk_buff *skb, __be32 address, const int received)
{
	struct peer4 *peer;

	if (!config.count_peers || !config.direct)
		return;
	peer = peer_of4(address);
	if (peer && is_plain_way4(skb, peer))
		count_peer(bytes4(peer->public_ip), received, skb->len);
}

static __always_inline int is_peer4(__be32 address)
{
	return bpf_map_lookup_elem(&peers4, &address) != 0;
}

static __always_inline int in_subnet4(__be32 address, const struct subnet4 *subnet)
{
	__be32 first;

	__builtin_memcpy(&first, subnet->address, sizeof(first));
	return !((address ^ first) & bpf_htonl(~0U << ((32 - subnet->prefix_length) & 31)));
}

static __always_inline struct endpoint4 *endpoint_of4(__be32 address)
{
	return bpf_map_lookup_elem(&endpoints4, &address);
}

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	return *(__u32 *)a == *(__u32 *)b && *(__u16 *)(a + 4) == *(__u16 *)(b + 4);
}

/*
 * The MAC of the tunnel device. Byte by byte, because a copy that is not volatile would be of the zeros that
 * the compiler sees here instead of what the loader put in their place.
 */
static __always_inline void copy_vtep_mac(__u8 mac[ETH_ALEN])
{
#pragma unroll
	for (int i = 0; i < ETH_ALEN; i++)
		mac[i] = config.vtep_mac[i];
}

static __always_inline int is_vtep_mac(const __u8 *mac)
{
	int differ = 0;

#pragma unroll
	for (int i = 0; i < ETH_ALEN; i++)
		differ |= mac[i] ^ config.vtep_mac[i];
	return !differ;
}

/* One hop less, and the header's checksum kept right (RFC 1624). */
static __always_inline void decrement_ttl(struct iphdr *ip)
{
	__u32 check = ip->check + bpf_htons(0x0100);

	ip->check = check + (check >= 0xffff);
	ip->ttl--;
}

/* Why the fast lane cannot carry a packet with these headers, whatever its flow, or VERDICT_UNRELATED if it can. */
static __always_inline enum verdict does_not_fit4(struct __sk_buff *skb, __u32 offset,
						  const struct packet4 *packet, __u32 mtu)
{
	if (packet->header != sizeof(struct iphdr))
		return VERDICT_STACK_OPTIONS;
	if (packet->ttl <= 1)
		return VERDICT_STACK_TTL;
	if (wire_length4(skb, offset, packet) > mtu)
		return VERDICT_STACK_TOO_BIG;
	if (config.fast_path == FAST_PATH_OFF || config.fast_path == FAST_PATH_STACK)
		return VERDICT_STACK_OFF;
	return VERDICT_UNRELATED;
}

/* Why the fast lane leaves a packet with these headers to the stack, or VERDICT_UNRELATED if it does not. */
static __always_inline enum verdict needs_stack4(struct __sk_buff *skb, __u32 offset,
						 const struct packet4 *packet, __u32 mtu)
{
	enum verdict verdict = does_not_fit4(skb, offset, packet, mtu);

	if (verdict != VERDICT_UNRELATED)
		return verdict;
	if (config.fast_path == FAST_PATH_AUTO && flow_is_on_stack(skb, offset, packet))
		return VERDICT_STACK_FLOW;
	return VERDICT_UNRELATED;
}

/* Whether the tunnel carries the IP packet itself. The kernel then has no tunnel of its own beneath. */
static __always_inline int is_plain_tunnel(void)
{
	return config.tunnel == TUNNEL_IPIP || config.tunnel == TUNNEL_UDP;
}

/* Whether this looks like a packet of the tunnel: by its port, or with ipip by its protocol. */
static __always_inline int is_for_tunnel_port(const struct packet4 *packet)
{
	if (config.tunnel == TUNNEL_IPIP)
		return packet->protocol == IPPROTO_IPIP;
	return config.tunnel && packet->protocol == IPPROTO_UDP &&
	       packet->destination_port == config.tunnel_port;
}

/*
 * Lets the hooks where packets leave the stack know that this one entered it as it is. What might be a tunnel
 * packet keeps the mark that it was not checked.
 */
static __always_inline void stamp(struct __sk_buff *skb, const struct packet4 *packet)
{
	if (watches_flows() && !is_for_tunnel_port(packet))
		skb->tc_index = flow_stamp(packet);
}

/* Hands the packet, whose IP header follows the Ethernet header, to a pod of this node. */
static __always_inline int deliver4(struct __sk_buff *skb, const struct endpoint4 *endpoint,
				    enum verdict delivered, enum verdict *verdict)
{
	struct ethhdr *ethernet = packet_data(skb);
	struct iphdr *ip = (void *)(ethernet + 1);

	*verdict = VERDICT_DROP_FAILED;
	if ((void *)(ip + 1) > packet_end(skb))
		return DROP;
	__builtin_memcpy(ethernet->h_dest, endpoint->mac, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, endpoint->gateway_mac, ETH_ALEN);
	decrement_ttl(ip);
	/* Bridge ports see packets for the bridge as somebody else's, and a pod would refuse them. */
	if (skb->pkt_type != PACKET_HOST && bpf_skb_change_type(skb, PACKET_HOST))
		return DROP;
	*verdict = delivered;
	if (endpoint->delivery == DELIVERY_PEER)
		return bpf_redirect_peer(endpoint->ifindex, 0);
	return bpf_redirect(endpoint->ifindex, 0);
}

/*
 * Hands a packet to a pod of this node that the control plane does not know yet, by the kernel's route to it: the
 * kernel asks for the pod's MAC, and so it becomes known, or tells the sender that there is no such pod. Past the
 * rest of the stack, because a FORWARD chain that lets in only what was asked for (Docker's) would keep a pod
 * unknown that waits to be spoken to.
 */
static __always_inline int introduce4(struct __sk_buff *skb, const struct packet4 *packet,
				      enum verdict *verdict)
{
	struct bpf_fib_lookup lookup = {};
	__u32 ifindex;
	struct iphdr *ip;
	long found;

	*verdict = VERDICT_STACK_LOCAL;
	if (!is_local_pod4(packet->destination))
		return NEXT;
	*verdict = needs_stack4(skb, ETH_HLEN, packet, 0xffff);
	if (*verdict != VERDICT_UNRELATED)
		return NEXT;
	*verdict = VERDICT_STACK_LOCAL;
	lookup.family = AF_INET;
	lookup.ipv4_src = packet->source;
	lookup.ipv4_dst = packet->destination;
	lookup.tot_len = wire_length4(skb, ETH_HLEN, packet);
	lookup.ifindex = skb->ifindex;
	found = bpf_fib_lookup(skb, &lookup, sizeof(lookup), 0);
	ifindex = lookup.ifindex;
	if ((found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH) ||
	    !bpf_map_lookup_elem(&interfaces, &ifindex))
		return NEXT;
	ip = packet_data(skb) + ETH_HLEN;
	if ((void *)(ip + 1) > packet_end(skb))
		return NEXT;
	decrement_ttl(ip);
	*verdict = VERDICT_DELIVERED;
	/* With the next hop given, the packet would have no route, and its failure no answer. */
	return bpf_redirect_neigh(ifindex, 0, 0, 0);
}

/*
 * Whether the next hop still has to say which MAC it has. A packet that the stack has routed would wait for that
 * with its route, and then be sent to the MAC this route leads to, which is the one inside the tunnel. Not inlined: what
 * opens a connection has little room on the stack of to_overlay.
 */
static __noinline int awaits_neighbour4(struct __sk_buff *skb, const struct peer4 *peer)
{
	struct bpf_fib_lookup lookup = {};

	lookup.family = AF_INET;
	lookup.ipv4_dst = bytes4(peer->next_hop);
	lookup.ifindex = peer->ifindex;
	return bpf_fib_lookup(skb, &lookup, sizeof(lookup), BPF_FIB_LOOKUP_OUTPUT) ==
	       BPF_FIB_LKUP_RET_NO_NEIGH;
}

static __always_inline int send_to_neighbour4(const struct peer4 *peer)
{
	struct bpf_redir_neigh next_hop = {};

	next_hop.nh_family = AF_INET;
	next_hop.ipv4_nh = bytes4(peer->next_hop);
	return bpf_redirect_neigh(peer->ifindex, &next_hop, sizeof(next_hop), 0);
}

/*
 * Internet checksum of an IPv4 header without options: what belongs in its checksum field if that is 0, and 0
 * if what is in it is right.
 */
static __always_inline __u16 header_checksum(const struct iphdr *ip)
{
	const __u32 *word = (const __u32 *)ip;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 5; i++)
		sum += word[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * Whether the inner source is one that this outer source may use: in its subnet, or itself. `held` is a subnet that
 * it has by `peers4`, and mostly the only one; `subnets4` knows them all. What one of the two has lost by another hand
 * than ours costs no packet.
 */
static __always_inline int is_source_of4(__be32 inner, __be32 outer, const struct subnet4 *held)
{
	struct peer4 *peer;

	if (held && (inner == outer || in_subnet4(inner, held)))
		return 1;
	peer = peer_of4(inner);
	return peer && bytes4(peer->public_ip) == outer;
}

/*
 * What the outer header's ECN field does to the inner one's when the tunnel ends (RFC 6040, figure 4): the
 * new inner field, or -1 if the packet must be dropped.
 */
static __always_inline int ecn_decapsulate(__u8 outer, __u8 inner)
{
	outer &= ECN_MASK;
	inner &= ECN_MASK;
	if (outer == ECN_CE)
		return inner ? ECN_CE : -1;
	if (outer == ECN_ECT1 && inner == ECN_ECT0)
		return ECN_ECT1;
	return inner;
}

/* What the outer header's ECN field says on the way (RFC 3168, section 9.1.1), as the kernel's tunnels have it. */
static __always_inline __u8 ecn_encapsulate(__u8 inner)
{
	__u8 ecn = inner & ECN_MASK;

	return ecn == ECN_CE ? ECN_ECT0 : ecn;
}

/* Gives the packet, of which `tos` is read already, another ECN field, and keeps its checksum right (RFC 1624). */
static __always_inline void set_ecn(struct iphdr *ip, __u8 tos, __u8 ecn)
{
	__u8 changed = (tos & ~ECN_MASK) | ecn;
	__u32 check = (__u16)~ip->check + (__u16)~bpf_htons(tos) + bpf_htons(changed);

	check = (check & 0xffff) + (check >> 16);
	check = (check & 0xffff) + (check >> 16);
	ip->check = ~check;
	ip->tos = changed;
}

/*
 * Puts the tunnel's headers in front of the frame's IP packet (RFC 7348) and sends it to the peer. If it is
 * too large, or an aggregate that is already encapsulated, the packet stays as it was and the verdict is
 * DEVICE.
 */
static __always_inline int encapsulate4(struct __sk_buff *skb, const struct peer4 *peer,
					const struct packet4 *packet, enum verdict *verdict)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET |
			    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
			    BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;
	__u32 length = skb->len - ETH_HLEN + sizeof(struct vxlan_headers4);
	__u32 ports = config.source_port_max - config.source_port_min + 1;
	/* Fragments keep together: their source port does not depend on ports that only the first one has. */
	__u32 hash = flow_hash(packet, packet->fragment ? 0 : flow_ports(packet));
	struct vxlan_headers4 *outer;
	struct iphdr ip = {};

	*verdict = VERDICT_DEVICE;
	if (length > 0xffff)
		return NEXT;
	if (bpf_skb_adjust_room(skb, sizeof(*outer), BPF_ADJ_ROOM_MAC, flags))
		return NEXT;
	*verdict = VERDICT_DROP_FAILED;
	outer = packet_data(skb) + ETH_HLEN;
	if ((void *)(outer + 1) > packet_end(skb))
		return DROP;

	ip.version = 4;
	ip.ihl = 5;
	/* What the tunnel adds can be told apart. */
	ip.tos = ecn_encapsulate(packet->tos);
	ip.tot_len = bpf_htons(length);
	ip.id = bpf_get_prandom_u32(); /* RFC 6864: unique, since the tunnel may be fragmented */
	ip.ttl = config.ttl;
	ip.protocol = IPPROTO_UDP;
	ip.saddr = config.vtep4;
	ip.daddr = bytes4(peer->public_ip);
	ip.check = header_checksum(&ip);
	outer->ip = ip;

	/* One source port a flow, so that the network can spread flows and keep each in order. */
	outer->udp.source = bpf_htons(config.source_port_min + (((hash >> 16) * ports) >> 16));
	outer->udp.dest = config.tunnel_port;
	outer->udp.len = bpf_htons(length - sizeof(struct iphdr));
	outer->udp.check = 0; /* the inner checksums protect what matters (RFC 7348, section 5) */
	outer->vxlan.flags = VXLAN_FLAG_VNI;
	outer->vxlan.vni = bpf_htonl(config.vni << 8);
	__builtin_memcpy(outer->ethernet.h_dest, peer->vtep_mac, ETH_ALEN);
	copy_vtep_mac(outer->ethernet.h_source);
	outer->ethernet.h_proto = bpf_htons(ETH_P_IP);
	/* Between hosts that share a kernel the next one would take our stamp for its own. */
	skb->tc_index = 0;
	count_peer(ip.daddr, SENT, length - sizeof(*outer) + ETH_HLEN);
	*verdict = VERDICT_ENCAPSULATED;
	return send_to_neighbour4(peer);
}

/* Sends a pod's packet, whose hop is already counted, through the kernel's tunnel device. */
static __always_inline int send_to_device4(struct __sk_buff *skb, const struct peer4 *peer,
					   enum verdict *verdict)
{
	struct ethhdr *ethernet = packet_data(skb);

	*verdict = VERDICT_DROP_FAILED;
	if ((void *)(ethernet + 1) > packet_end(skb))
		return DROP;
	__builtin_memcpy(ethernet->h_dest, peer->vtep_mac, ETH_ALEN);
	copy_vtep_mac(ethernet->h_source);
	*verdict = VERDICT_DEVICE;
	return bpf_redirect(config.overlay_ifindex, 0);
}

#endif
