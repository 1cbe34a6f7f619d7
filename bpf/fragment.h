/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The fragments of packets for pods behind our address, and of packets that are let in from outside. Only the first one
 * has ports and says what becomes of the packet; it leaves a note in fragments4 for the others. Those that come before it are kept, byte by byte, in held4: the
 * first one then sends itself and them in once more, in this order, and everybody finds the note.
 */
#ifndef TWILL_FRAGMENT_H
#define TWILL_FRAGMENT_H

#include "forward.h"

#define EEXIST 17
#define FRAGMENT_NS 10000000000ULL

/* What an IP header says of the packet that a fragment is of: of one end's making, so of `id` and both addresses. */
static __always_inline int fragment_key4(struct fragment4 *key, struct __sk_buff *skb,
					 const struct packet4 *packet)
{
	__builtin_memset(key, 0, sizeof(*key));
	__builtin_memcpy(key->source, &packet->source, sizeof(packet->source));
	__builtin_memcpy(key->destination, &packet->destination, sizeof(packet->destination));
	key->protocol = packet->protocol;
	return bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, id), &key->id, sizeof(key->id));
}

/* Lets the other fragments know by which address to replace ours, or the pod's; 0 if they stay as they are. */
static __always_inline void note_fragments4(const struct fragment4 *key, __be32 address)
{
	struct datagram4 datagram = {.since_ns = bpf_ktime_get_ns()};

	__builtin_memcpy(datagram.address, &address, sizeof(address));
	bpf_map_update_elem(&fragments4, key, &datagram, BPF_ANY);
}

static __always_inline struct datagram4 *datagram_of4(const struct fragment4 *key)
{
	struct datagram4 *datagram = bpf_map_lookup_elem(&fragments4, key);

	/* The id comes round again. */
	if (datagram && bpf_ktime_get_ns() - datagram->since_ns > FRAGMENT_NS)
		return 0;
	return datagram;
}

/* The length of a held fragment, in a way that the verifier follows: the compiler may not know what it is. */
static __always_inline __u32 bounded(__u32 length)
{
	asm volatile("" : "+r"(length));
	return length & (HELD_BYTES - 1);
}

/* The packet that a fragment is of in scalars, which is all that a function verified on its own may take. */
static __always_inline void unpack_fragment4(struct fragment4 *key, __u32 source, __u32 destination,
					     __u32 kind)
{
	__builtin_memset(key, 0, sizeof(*key));
	__builtin_memcpy(key->source, &source, sizeof(source));
	__builtin_memcpy(key->destination, &destination, sizeof(destination));
	key->id = kind;
	key->protocol = kind >> 16;
}

static __always_inline __u32 kind_of_fragment(const struct fragment4 *key)
{
	return key->id | ((__u32)key->protocol << 16);
}

/* Not static, nor is the next: the verifier looks at their loops once, instead of once for each way to each call. */
__noinline int hold_fragment4(struct __sk_buff *skb, __u32 source, __u32 destination, __u32 kind,
			      __u32 length)
{
	struct held_key4 key = {};
	__u32 only = 0;
	struct held4 *held = bpf_map_lookup_elem(&holding, &only);
	long error = -1;

	unpack_fragment4(&key.fragment, source, destination, kind);
	if (!held || length >= HELD_BYTES)
		return -1;
	length = bounded(length);
	if (length < sizeof(struct iphdr))
		return -1;
	held->since_ns = bpf_ktime_get_ns();
	held->length = length;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, held->bytes, length))
		return -1;
	for (__u32 i = 0; i < HELD_FRAGMENTS; i++) {
		key.index = i;
		error = bpf_map_update_elem(&held4, &key, held, BPF_NOEXIST);
		if (error != -EEXIST)
			break;
	}
	if (error)
		return -1;
	/* The first one may have come meanwhile, and not have seen it. */
	return datagram_of4(&key.fragment) && !bpf_map_delete_elem(&held4, &key) ? -1 : 0;
}

/* Keeps a fragment until the first one of its packet is there. Nonzero if there is no room, or need, for that. */
static __always_inline int hold4(struct __sk_buff *skb, const struct fragment4 *fragment, __u32 length)
{
	return hold_fragment4(skb, bytes4(fragment->source), bytes4(fragment->destination),
			      kind_of_fragment(fragment), length);
}

__noinline int release_fragments4(struct __sk_buff *skb, __u32 source, __u32 destination, __u32 kind)
{
	struct held_key4 key = {};
	__u64 now = bpf_ktime_get_ns();
	__u32 ifindex = skb->ifindex;
	struct held4 *held;
	int released = 0;

	unpack_fragment4(&key.fragment, source, destination, kind);
	for (__u32 i = 0; i < HELD_FRAGMENTS; i++) {
		__u32 length;
		int fresh;

		key.index = i;
		held = bpf_map_lookup_elem(&held4, &key);
		if (!held)
			break;
		length = bounded(held->length);
		fresh = now - held->since_ns <= FRAGMENT_NS;
		if (!fresh) {
			bpf_map_delete_elem(&held4, &key);
			continue;
		}
		if (!released && bpf_clone_redirect(skb, ifindex, BPF_F_INGRESS))
			return 0;
		released = 1;
		if (length < sizeof(struct iphdr) || bpf_skb_change_tail(skb, ETH_HLEN + length, 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN, held->bytes, length, 0))
			continue;
		/* Whoever takes it out sends it. */
		if (!bpf_map_delete_elem(&held4, &key))
			bpf_clone_redirect(skb, ifindex, BPF_F_INGRESS);
	}
	return released;
}

/*
 * Sends the first fragment in again, and behind it those that have waited for it: in place of the packet at hand,
 * which is not needed then. 0 if none has waited.
 */
static __always_inline int release4(struct __sk_buff *skb, const struct fragment4 *fragment)
{
	return release_fragments4(skb, bytes4(fragment->source), bytes4(fragment->destination),
				  kind_of_fragment(fragment));
}

#endif
