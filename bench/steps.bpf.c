// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* What the programs of Twill are made of, each step alone, for bench/programs.ts. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"

#define NEXT (-1)
/* Look-ups in one run, as the clock counts in tens of nanoseconds. */
#define TIMES 8

#ifndef BPF_F_ADJ_ROOM_ENCAP_L2_ETH
#define BPF_F_ADJ_ROOM_ENCAP_L2_ETH (1ULL << 6)
#endif

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* As endpoints4 and peers4. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, ENDPOINTS_MAX);
	__type(key, struct address4);
	__type(value, struct endpoint4);
} addresses SEC(".maps");

/* As subnets4. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SUBNETS_MAX);
	__type(key, struct subnet4);
	__type(value, struct peer4);
} subnets SEC(".maps");

/* As flows4, in which most packets find nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, FLOWS_MAX);
	__type(key, struct flow4);
	__type(value, struct flow);
} flows SEC(".maps");

SEC("tc")
int empty(struct __sk_buff *skb)
{
	return NEXT;
}

static __always_inline int times_found(void *map, const void *key)
{
	int found = 0;

#pragma unroll
	for (int i = 0; i < TIMES; i++)
		found += bpf_map_lookup_elem(map, key) != 0;
	return found;
}

SEC("tc")
int address(struct __sk_buff *skb)
{
	struct address4 key = {};

	return times_found(&addresses, &key) == TIMES ? NEXT : 0;
}

SEC("tc")
int subnet(struct __sk_buff *skb)
{
	struct subnet4 key = {};

	return times_found(&subnets, &key) == TIMES ? NEXT : 0;
}

SEC("tc")
int flow(struct __sk_buff *skb)
{
	struct flow4 key = {};

	return times_found(&flows, &key) ? 0 : NEXT;
}

SEC("tc")
int grow(struct __sk_buff *skb)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET |
			    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
			    BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;

	return bpf_skb_adjust_room(skb, VXLAN_OVERHEAD4, BPF_ADJ_ROOM_MAC, flags) ? 0 : NEXT;
}

SEC("tc")
int shrink(struct __sk_buff *skb)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;

	return bpf_skb_adjust_room(skb, -(__s32)VXLAN_OVERHEAD4, BPF_ADJ_ROOM_MAC, flags) ? 0 : NEXT;
}

SEC("tc")
int redirect(struct __sk_buff *skb)
{
	struct bpf_redir_neigh next_hop = { .nh_family = 2, .ipv4_nh = 1 };

	return bpf_redirect_neigh(1, &next_hop, sizeof(next_hop), 0) == 7 ? NEXT : 0;
}
