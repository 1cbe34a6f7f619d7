/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Every map, on one screen. All are pinned; only the control plane writes them, but for flows4, inbound4,
 * in_device4, counters, traffic4 and those of connections and events. */
#ifndef TWILL_MAPS_H
#define TWILL_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"

/* Which peer holds a subnet: the table every packet between nodes is looked up in. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SUBNETS_MAX);
	__type(key, struct subnet4);
	__type(value, struct peer4);
} subnets4 SEC(".maps");

/* Who may send us tunnel packets, by outer source address. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SUBNETS_MAX);
	__type(key, struct address4);
	__type(value, struct subnet4);
} peers4 SEC(".maps");

/* The pods of this node. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, ENDPOINTS_MAX);
	__type(key, struct address4);
	__type(value, struct endpoint4);
} endpoints4 SEC(".maps");

/* The interfaces behind which pods are. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, INTERFACES_MAX);
	__type(key, __u32);
	__type(value, struct interface);
} interfaces SEC(".maps");

/* The flows that stay on the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, FLOWS_MAX);
	__type(key, struct flow4);
	__type(value, struct flow);
} flows4 SEC(".maps");

/* The flows that were let in from outside the network: their answers take the same way, past the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, INBOUND_MAX);
	__type(key, struct flow4);
	__type(value, struct inbound);
} inbound4 SEC(".maps");

/* The tunnel flows of which packets may still be in the kernel's device. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, IN_DEVICE_MAX);
	__type(key, __u32);
	__type(value, struct in_device);
} in_device4 SEC(".maps");

/* The interfaces by which pods reach the outside, and the outside reaches pods elsewhere; our address there. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, UPLINKS_MAX);
	__type(key, __u32);
	__type(value, struct uplink4);
} uplinks4 SEC(".maps");

/* Where pods go with their own address. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, EXCLUDED_MAX);
	__type(key, struct excluded4);
	__type(value, __u32);
} excluded4 SEC(".maps");

/* The masqueraded flows, a row each. Preallocated, and no row ever makes room for another. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, CONNECTIONS_MAX);
	__type(key, struct connection_key4);
	__type(value, struct connection4);
} connections4 SEC(".maps");

/* How far along its candidate ports a flow's row may be. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PROBES_MAX);
	__type(key, __u32);
	__type(value, struct probe);
} probes4 SEC(".maps");

/* Where masqueraded flows went a moment ago. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, WAYS_MAX);
	__type(key, __u32);
	__type(value, struct way4);
} ways4 SEC(".maps");

/* Every connection once, in the order in which they are looked at. The control plane makes it a little longer. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, CONNECTIONS_MAX);
	__uint(key_size, 0);
	__type(value, struct expiring4);
} expiring4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct expiry);
} expiry SEC(".maps");

/* How many connections there are, so that nobody need walk through them to know. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CENSUS_ROWS);
	__type(key, __u32);
	__type(value, struct census4);
} census4 SEC(".maps");

/* Whose the fragments of a packet are. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, FRAGMENTS_MAX);
	__type(key, struct fragment4);
	__type(value, struct datagram4);
} fragments4 SEC(".maps");

/* Fragments that nobody knows yet whose they are. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, HELD_MAX);
	__type(key, struct held_key4);
	__type(value, struct held4);
} held4 SEC(".maps");

/* Where a fragment is put together on its way into held4. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct held4);
} holding SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hook_counts);
} counters SEC(".maps");

/* Packets between this node and each peer, if that is asked for; else it is a map of one row, and empty. The control
 * plane takes the row of a peer that is gone. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SUBNETS_MAX);
	__type(key, struct address4);
	__type(value, struct traffic);
} traffic4 SEC(".maps");

/* What happens that somebody may want to know, each a struct event. It has one reader at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
} events SEC(".maps");

/* Whether anybody does. Only who reads `events` writes it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct watch);
} watch SEC(".maps");

/* How much more each processor may report. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct budget);
} event_budget SEC(".maps");

#endif
