/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Events: the packets that are dropped, and those that put a flow on the stack, for whoever watches.
 *
 * While nobody does, that is one look-up for each of them, and nothing for a packet that is forwarded. While somebody
 * does, each processor has a budget, and what goes beyond it is only counted: a flood costs two look-ups a packet,
 * and not even a reading of the clock.
 */
#ifndef TWILL_EVENT_H
#define TWILL_EVENT_H

#include "maps.h"
#include "parse.h"

#define EVENT_NS (1000000000ULL / EVENTS_PER_SECOND)

/* Whether this event may be reported: somebody watches, and this processor has not said too much already. */
static __always_inline int may_report(struct budget *budget, struct watch *watch, __u64 now)
{
	__u64 events;

	if (now > watch->until_ns) {
		/* The reader is gone; it would renew this. */
		watch->until_ns = 0;
		return 0;
	}
	events = (now - budget->filled_ns) / EVENT_NS;
	budget->tick = bpf_jiffies64();
	if (events >= EVENTS_AT_ONCE) {
		budget->tokens = EVENTS_AT_ONCE;
		budget->filled_ns = now;
	} else {
		budget->filled_ns += events * EVENT_NS;
		events += budget->tokens;
		budget->tokens = events > EVENTS_AT_ONCE ? EVENTS_AT_ONCE : events;
	}
	if (!budget->tokens) {
		budget->suppressed++;
		return 0;
	}
	budget->tokens--;
	return 1;
}

/*
 * Tells whoever watches what becomes of the packet at hand. Not static, so that the verifier looks at it once and
 * the programs hold no more of it than the call.
 */
__noinline int report(struct __sk_buff *skb, __u32 hook, __u32 verdict)
{
	struct budget *budget;
	struct watch *watching;
	struct event *event;
	__u64 now, last = skb->len - 1ULL;
	__u32 only = 0;

	watching = bpf_map_lookup_elem(&watch, &only);
	if (!watching || !watching->until_ns)
		return 0;
	budget = bpf_map_lookup_elem(&event_budget, &only);
	if (!budget)
		return 0;
	if (!budget->tokens && budget->tick == bpf_jiffies64()) {
		budget->suppressed++;
		return 0;
	}
	now = bpf_ktime_get_ns();
	if (!may_report(budget, watching, now))
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		budget->lost++;
		return 0;
	}
	event->time_ns = now;
	event->ifindex = skb->ifindex;
	event->hook = hook;
	event->verdict = verdict;
	event->length = skb->len;
	__builtin_memset(event->pad, 0, sizeof(event->pad));
	/*
	 * Up to the last byte: verifiers before Linux 6.8 do not learn from a comparison with 0 that there is at least
	 * one. The compiler may not know what it is, or it does this in a way that they do not follow.
	 */
	if (last >= EVENT_BYTES)
		last = EVENT_BYTES - 1;
	asm volatile("" : "+r"(last));
	event->captured = bpf_skb_load_bytes(skb, 0, event->bytes, last + 1) ? 0 : last + 1;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

#endif
