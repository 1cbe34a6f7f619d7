/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Tunnels that carry the IP packet itself: ipip (RFC 2003), and flannel's udp, which is the IP packet as the payload of
 * a UDP one. The programs alone open and close them. A device of ours that carries nothing stands where the kernel's
 * or flanneld's stood: what the stack routes into it is encapsulated as it leaves, what from_net opens for the stack
 * comes in by it. So nothing is beneath to pass a packet on to, and what can't be done here is dropped and counted.
 */
#ifndef TWILL_PLAIN_H
#define TWILL_PLAIN_H

#include "forward.h"

#define DONT_FRAGMENT bpf_htons(0x4000)

/* The 28 bytes before the inner packet with udp. */
struct udp_headers4 {
	struct iphdr ip;
	struct udphdr udp;
} __attribute__((packed));

/*
 * Puts the headers of the tunnel, one of those above, in front of the frame's IP packet and sends it to the peer.
 * `awaited` is whether the next hop still has to say which MAC it has.
 */
static __always_inline int encapsulate_as4(struct __sk_buff *skb, const struct peer4 *peer,
					   const struct packet4 *packet, const int udp, int awaited,
					   enum verdict *verdict)
{
	const __u32 overhead = udp ? sizeof(struct udp_headers4) : sizeof(struct iphdr);
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET |
			    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | (udp ? BPF_F_ADJ_ROOM_ENCAP_L4_UDP : 0);
	__u32 length = skb->len - ETH_HLEN + overhead;
	struct iphdr *inner = packet_data(skb) + ETH_HLEN;
	struct udp_headers4 *outer;
	struct iphdr ip = {};

	*verdict = VERDICT_DROP_UNREACHABLE;
	if (peer->reach != REACH_TUNNEL)
		return DROP;
	*verdict = VERDICT_DROP_FAILED;
	if ((void *)(inner + 1) > packet_end(skb))
		return DROP;
	if (udp) {
		/* flannel's daemons, which carry these packets, count as a hop each. */
		*verdict = VERDICT_DROP_TTL;
		if (inner->ttl <= 1)
			return DROP;
		decrement_ttl(inner);
	} else {
		/* RFC 2003, section 3.1, and 6040: what the tunnel adds to the ECN field can be told apart. */
		ip.frag_off = inner->frag_off & DONT_FRAGMENT;
		ip.tos = ecn_encapsulate(packet->tos);
	}
	*verdict = VERDICT_DROP_FAILED;
	if (bpf_skb_adjust_room(skb, overhead, BPF_ADJ_ROOM_MAC, flags))
		return DROP;
	outer = packet_data(skb) + ETH_HLEN;
	if ((void *)outer + overhead > packet_end(skb))
		return DROP;
	ip.version = 4;
	ip.ihl = 5;
	/* That of an aggregate is set anew for each segment. */
	ip.tot_len = bpf_htons(length > 0xffff ? 0xffff : length);
	ip.id = bpf_get_prandom_u32(); /* RFC 6864: unique, since the tunnel may be fragmented */
	ip.ttl = config.ttl;
	ip.protocol = udp ? IPPROTO_UDP : IPPROTO_IPIP;
	ip.saddr = config.vtep4;
	ip.daddr = bytes4(peer->public_ip);
	ip.check = header_checksum(&ip);
	outer->ip = ip;
	if (udp) {
		/* Both ports are the daemon's; the inner checksums protect what matters. */
		outer->udp.source = config.tunnel_port;
		outer->udp.dest = config.tunnel_port;
		outer->udp.len = bpf_htons(bpf_ntohs(ip.tot_len) - sizeof(struct iphdr));
		outer->udp.check = 0;
	}
	/* Between hosts that share a kernel the next one would take our stamp for its own. */
	skb->tc_index = 0;
	count_peer(ip.daddr, SENT, length - overhead + ETH_HLEN);
	*verdict = VERDICT_ENCAPSULATED;
	/* What waits for a MAC needs a route of its own in place of the one by which it came here. */
	return awaited ? bpf_redirect_neigh(peer->ifindex, 0, 0, 0) : send_to_neighbour4(peer);
}

/* Not inlined, like those that open: they would give the programs of all other backends another shape. */
static __noinline int encapsulate_ipip4(struct __sk_buff *skb, const struct peer4 *peer,
					const struct packet4 *packet, int awaited, enum verdict *verdict)
{
	return encapsulate_as4(skb, peer, packet, 0, awaited, verdict);
}

static __noinline int encapsulate_udp4(struct __sk_buff *skb, const struct peer4 *peer,
				       const struct packet4 *packet, int awaited, enum verdict *verdict)
{
	return encapsulate_as4(skb, peer, packet, 1, awaited, verdict);
}

static __always_inline int encapsulate_plain4(struct __sk_buff *skb, const struct peer4 *peer,
					      const struct packet4 *packet, int awaited,
					      enum verdict *verdict)
{
	return config.tunnel == TUNNEL_UDP ? encapsulate_udp4(skb, peer, packet, awaited, verdict)
					   : encapsulate_ipip4(skb, peer, packet, awaited, verdict);
}

/* What a tunnel packet of a peer, whose inner headers are `inner`, is: in order, or to be dropped and why. */
static __always_inline enum verdict check_plain4(struct __sk_buff *skb, const struct packet4 *outer,
						 const struct packet4 *inner, const int udp)
{
	const __u32 overhead = udp ? sizeof(struct udp_headers4) : sizeof(struct iphdr);
	struct udphdr *header;
	struct iphdr *ip;

	/* Has the packet's bounds read anew: merged with an earlier reading, they are no pointers to the verifier. */
	asm volatile("" ::: "memory");
	ip = packet_data(skb) + ETH_HLEN;
	header = (void *)(ip + 1);
	if ((void *)ip + overhead > packet_end(skb))
		return VERDICT_DROP_MALFORMED;
	/* Nobody else looks at the outer headers. Those of an aggregate were looked at when it was made. */
	if (!segment_size(skb) && (inner->length + overhead > outer->length || header_checksum(ip) ||
				   (udp && bpf_ntohs(header->len) + sizeof(struct iphdr) != outer->length)))
		return VERDICT_DROP_MALFORMED;
	if (!is_source_of4(inner->source, outer->source, bpf_map_lookup_elem(&peers4, &outer->source)))
		return VERDICT_DROP_FORGED;
	if (udp && inner->ttl <= 1)
		return VERDICT_DROP_TTL;
	if (!udp && ecn_decapsulate(outer->tos, inner->tos) < 0)
		return VERDICT_DROP_ECN;
	return VERDICT_OPENED;
}

/* Whether a packet that is no peer's looks like one of the cluster; other ipip tunnels of this node are not ours. */
static __always_inline int is_of_network4(struct __sk_buff *skb, const struct packet4 *outer, const int udp)
{
	struct iphdr ip;

	if (udp || outer->fragment || bpf_skb_load_bytes(skb, ETH_HLEN + outer->header, &ip, sizeof(ip)))
		return udp;
	return in_network4(ip.saddr) || in_network4(ip.daddr);
}

/*
 * Opens a tunnel packet for this node. What is for a known pod is handed to it, TCP too: all of a flow takes this way.
 * An aggregate keeps the marks of its tunnel, which no receiver minds.
 */
static __always_inline int open_as4(struct __sk_buff *skb, const struct packet4 *outer, const int udp,
				    enum verdict *verdict)
{
	const __u32 overhead = udp ? sizeof(struct udp_headers4) : sizeof(struct iphdr);
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	struct endpoint4 *endpoint;
	struct ethhdr *ethernet;
	struct packet4 inner;
	struct iphdr *ip;
	int for_pod, ecn;

	if (!is_peer4(outer->source)) {
		*verdict = VERDICT_UNRELATED;
		if (!is_of_network4(skb, outer, udp))
			return NEXT;
		*verdict = VERDICT_DROP_UNKNOWN_PEER;
		return DROP;
	}
	*verdict = VERDICT_DROP_FRAGMENT;
	if (outer->fragment)
		return DROP;
	*verdict = VERDICT_DROP_MALFORMED;
	if (outer->header != sizeof(*ip) || parse4(skb, ETH_HLEN + overhead, &inner) != PARSED)
		return DROP;
	*verdict = check_plain4(skb, outer, &inner, udp);
	if (*verdict != VERDICT_OPENED)
		return DROP;
	count_peer(outer->source, RECEIVED, skb->len - overhead);
	ecn = udp ? inner.tos & ECN_MASK : ecn_decapsulate(outer->tos, inner.tos);
	inner.ttl -= udp;
	endpoint = endpoint_of4(inner.destination);
	for_pod = endpoint && in_network4(inner.source) &&
		  needs_stack4(skb, ETH_HLEN + overhead, &inner, endpoint->mtu) == VERDICT_UNRELATED;

	*verdict = VERDICT_DROP_FAILED;
	/*
	 * With the marks of a UDP tunnel the kernel would take apart the wrong UDP. Only a cable within one kernel
	 * brings such aggregates.
	 */
	if (udp && segment_size(skb) && inner.protocol == IPPROTO_UDP)
		return DROP;
	if (bpf_skb_adjust_room(skb, -(__s32)overhead, BPF_ADJ_ROOM_MAC, flags))
		return DROP;
	/* The network card vouched for the checksum of the outer UDP header, not for the inner one. */
	if (udp && bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC) < 0)
		return DROP;
	ethernet = packet_data(skb);
	ip = (void *)(ethernet + 1);
	if ((void *)(ip + 1) > packet_end(skb))
		return DROP;
	if (udp)
		decrement_ttl(ip);
	if (ecn != (inner.tos & ECN_MASK))
		set_ecn(ip, inner.tos, ecn);
	if (for_pod && endpoint) {
		stamp(skb, &inner);
		return deliver4(skb, endpoint, VERDICT_DECAPSULATED, verdict);
	}
	copy_vtep_mac(ethernet->h_dest);
	skb->tc_index = CHECKED;
	*verdict = VERDICT_OPENED;
	return bpf_redirect(config.overlay_ifindex, BPF_F_INGRESS);
}

static __noinline int open_ipip4(struct __sk_buff *skb, const struct packet4 *outer, enum verdict *verdict)
{
	return open_as4(skb, outer, 0, verdict);
}

static __noinline int open_udp4(struct __sk_buff *skb, const struct packet4 *outer, enum verdict *verdict)
{
	return open_as4(skb, outer, 1, verdict);
}

static __always_inline int from_plain4(struct __sk_buff *skb, const struct packet4 *outer,
				       enum verdict *verdict)
{
	return config.tunnel == TUNNEL_UDP ? open_udp4(skb, outer, verdict) : open_ipip4(skb, outer, verdict);
}

#endif
