// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* What the programs of Twill are made of, each step alone, for bench/programs.ts. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

#define NEXT (-1)
/* Look-ups in one run, as the clock counts in tens of nanoseconds. */
#define TIMES 8

#ifndef BPF_F_ADJ_ROOM_ENCAP_L2_ETH
#define BPF_F_ADJ_ROOM_ENCAP_L2_ETH (1ULL << 6)
#endif

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct value {
	__u32 words[7];
};

struct key8 {
	__u32 words[2];
};

struct key16 {
	__u32 words[4];
};

/* As endpoints4 and peers4. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct value);
} addresses SEC(".maps");

/* As subnets4. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct key8);
	__type(value, struct value);
} subnets SEC(".maps");

/* As flows4, in which most packets find nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct key16);
	__type(value, __u64);
} flows SEC(".maps");

SEC("tc")
int empty(struct __sk_buff *skb)
{
	return NEXT;
}

SEC("tc")
int address(struct __sk_buff *skb)
{
	__u32 key = 1;
	int found = 0;

#pragma unroll
	for (int i = 0; i < TIMES; i++)
		found += bpf_map_lookup_elem(&addresses, &key) != 0;
	return found == TIMES ? NEXT : 0;
}

SEC("tc")
int subnet(struct __sk_buff *skb)
{
	struct key8 key = { { 1, 1 } };
	int found = 0;

#pragma unroll
	for (int i = 0; i < TIMES; i++)
		found += bpf_map_lookup_elem(&subnets, &key) != 0;
	return found == TIMES ? NEXT : 0;
}

SEC("tc")
int flow(struct __sk_buff *skb)
{
	struct key16 key = { { 1, 2, 3, 4 } };
	int found = 0;

#pragma unroll
	for (int i = 0; i < TIMES; i++)
		found += bpf_map_lookup_elem(&flows, &key) != 0;
	return found ? 0 : NEXT;
}

SEC("tc")
int grow(struct __sk_buff *skb)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET |
			    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
			    BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;

	return bpf_skb_adjust_room(skb, 50, BPF_ADJ_ROOM_MAC, flags) ? 0 : NEXT;
}

SEC("tc")
int shrink(struct __sk_buff *skb)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;

	return bpf_skb_adjust_room(skb, -50, BPF_ADJ_ROOM_MAC, flags) ? 0 : NEXT;
}

SEC("tc")
int redirect(struct __sk_buff *skb)
{
	struct bpf_redir_neigh next_hop = { .nh_family = 2, .ipv4_nh = 1 };

	return bpf_redirect_neigh(1, &next_hop, sizeof(next_hop), 0) == 7 ? NEXT : 0;
}
