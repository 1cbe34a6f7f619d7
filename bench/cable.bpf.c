// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * What a network card does to a packet that is sent, and a veth pair does not: bench/cable.ts says why and attaches it.
 *
 * `leave` is at the egress of the cable's end and sees a packet twice. The first time it is exchanged for a copy, which is
 * no socket's, and the packet ends here, as it does when a card has sent it. By then the copy only waits at the ingress
 * of another device; what is there, `travel`, gives it headers of its own and sends it on.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* A bit of skb->mark that no rules of the benchmark use; the packet that has it is on its way. */
#define TRAVELS 0x20000000

/* Not in the UAPI headers of every distribution: go on with the next program. */
#define NEXT (-1)

/* Interfaces: the cable's end, where copies wait, and one that is down, so that what goes there is freed. */
const volatile __u32 end, waiting, nowhere;

SEC("tc")
int leave(struct __sk_buff *skb)
{
	if (skb->mark & TRAVELS) {
		skb->mark &= ~TRAVELS;
		return NEXT;
	}
	bpf_clone_redirect(skb, waiting, BPF_F_INGRESS);
	/* To drop it would tell its sender of congestion. */
	return bpf_redirect(nowhere, BPF_F_INGRESS);
}

SEC("tc")
int travel(struct __sk_buff *skb)
{
	bpf_skb_change_head(skb, 0, 0);
	skb->mark |= TRAVELS;
	return bpf_redirect(end, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
