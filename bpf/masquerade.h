/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Masquerade: pods speak to the outside under this node's address.
 *
 * A connection is one row of connections4, under the names that the outside sees, so the way back is one exact
 * look-up. The way out derives the port anew each time: the flow's hash gives a sequence of candidate ports, and
 * probes4 says how far along that sequence a row may be. So there is no second row that could be lost apart from
 * the first, a full table refuses new flows and nothing else, and two processors that open the same flow at once
 * arrive at the same candidate, where only one of them can insert.
 *
 * A flow that came from outside to a pod's own address has a row as well, in which that address stands for ours:
 * its replies keep it.
 *
 * What comes from outside the network and goes on to a pod of another node, this node's own processes under an
 * outside address too, gets this node's address likewise, or the answers would not come back this way: that of the
 * tunnel device, or of the uplink where the peer is reached without a tunnel. Whoever sends stands for the pod then.
 */
#ifndef TWILL_MASQUERADE_H
#define TWILL_MASQUERADE_H

#include <linux/tcp.h>
#include "forward.h"
#include "fragment.h"

#define SECOND_NS 1000000000ULL
/* A connection that has ended so long ago gives its port away before those at the end of the search were asked. */
#define ENDED_NS (SECOND_NS / 10)
/* By so much later than it did has one ended whose remote may not take the new connection for one. */
#define UNFIT_NS (1ULL << 62)
#define MULTICAST4 bpf_htonl(0xe0000000)
#define MULTICAST4_MASK bpf_htonl(0xf0000000)

/* In a TCP header: offset of the sequence number, of the upper half byte with its length, of the byte with flags. */
#define TCP_SEQUENCE 4
#define TCP_LENGTH 12
#define TCP_FLAGS 13
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10
#define TCP_URG 0x20
#define TCP_ECE 0x40
#define TCP_OPTION_END 0
#define TCP_OPTION_NONE 1
#define TCP_OPTION_TIME 8
#define TCP_OPTIONS_BYTES 40

#define ICMP_CHECKSUM 2
#define UDP_CHECKSUM 6
#define TCP_CHECKSUM 16
#define ICMP_ECHO_ID 4

#define CLOCK_MONOTONIC 1

/* A flow as its pod sees it. */
struct pod_flow4 {
	__be32 pod;
	__be32 remote;
	__be16 pod_port; /* of an ICMP echo its identifier; 0 where there are no ports */
	__be16 remote_port;
	__u8 protocol;
	__u8 tcp_flags; /* of the packet at hand */
	__u8 free_port; /* may be another one outside */
	__u8 header;    /* bytes of the IP header of the packet at hand */
};

/* Whether the port may be another one outside. Those of SCTP are under a checksum that is not ours to redo. */
static __always_inline int has_free_port(__u8 protocol, __be16 port)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || (protocol == IPPROTO_ICMP && port);
}

static __always_inline __u32 spread(__u32 hash)
{
	hash = (hash ^ (hash >> 16)) * 0x7feb352d;
	hash = (hash ^ (hash >> 15)) * 0x846ca68b;
	return hash ^ (hash >> 16);
}

static __always_inline __u32 pod_flow_hash(const struct pod_flow4 *flow)
{
	__u32 hash = spread(flow->pod ^ config.masq_seed);

	hash = spread(hash ^ flow->remote);
	return spread(hash ^ (((__u32)flow->pod_port << 16) | flow->remote_port)) + flow->protocol;
}

/* A flow in scalars, which is all that a function verified on its own may take on every kernel. */
static __always_inline void unpack_flow4(struct pod_flow4 *flow, __u32 pod, __u32 remote, __u32 ports,
					 __u32 kind)
{
	flow->pod = pod;
	flow->remote = remote;
	flow->pod_port = ports;
	flow->remote_port = ports >> 16;
	flow->protocol = kind;
	flow->tcp_flags = kind >> 8;
	flow->free_port = has_free_port(flow->protocol, flow->pod_port);
	flow->header = kind >> 16;
}

/* The port that the flow has outside if it is the candidate number `index`. */
static __always_inline __be16 candidate_port(const struct pod_flow4 *flow, __u32 hash, __u32 index)
{
	__u16 port = bpf_ntohs(flow->pod_port);
	__u64 ports = config.masq_port_max - config.masq_port_min + 1;

	if (!index && (!flow->free_port || (port >= config.masq_port_min && port <= config.masq_port_max)))
		return flow->pod_port;
	return bpf_htons(config.masq_port_min + (__u16)((spread(hash + index * 0x9e3779b9) * ports) >> 32));
}

/*
 * The same for loops, with the index above it, in the upper half. Not static: the verifier looks at it on its own, and
 * takes what it returns for any number, so that a loop has not one state for each way through it, nor for each index that
 * it may have remembered; verifiers before Linux 6.2 would give up.
 */
__noinline int next_candidate4(__u32 port, __u32 kind, __u32 hash, __u32 index)
{
	struct pod_flow4 flow;

	unpack_flow4(&flow, 0, 0, port, kind);
	return candidate_port(&flow, hash, index) | index << 16;
}

static __always_inline __u32 bucket_of(__u32 hash)
{
	return hash & (PROBES_MAX - 1);
}

static __always_inline void connection_key4(struct connection_key4 *key, const struct pod_flow4 *flow,
					    __be32 address, __be16 port)
{
	__builtin_memset(key, 0, sizeof(*key));
	__builtin_memcpy(key->address, &address, sizeof(address));
	__builtin_memcpy(key->remote, &flow->remote, sizeof(flow->remote));
	key->port = port;
	key->remote_port = flow->remote_port;
	key->protocol = flow->protocol;
}

static __always_inline int is_of_flow4(const struct connection4 *connection, const struct pod_flow4 *flow)
{
	__u32 differ = (bytes4(connection->pod) ^ flow->pod) | (connection->pod_port ^ flow->pod_port);

	return !differ && connection->state != CONNECTION_GONE;
}

static __always_inline __u32 ports_of(const struct pod_flow4 *flow)
{
	return flow->pod_port | ((__u32)flow->remote_port << 16);
}

static __always_inline __u32 kind_of(const struct pod_flow4 *flow)
{
	return flow->protocol | ((__u32)flow->tcp_flags << 8) | ((__u32)flow->header << 16);
}

/*
 * What the timestamp option of the TCP header at `at` says of its sender's clock (RFC 7323, section 3.2), or 0 without
 * one, or without a header, where `at` is 0. Not static for the same reason as find_port4.
 */
__noinline int tcp_time4(struct __sk_buff *skb, __u32 at)
{
	__u8 length, option[2];
	__be32 time;
	__u32 end;

	if (!at || bpf_skb_load_bytes(skb, at + TCP_LENGTH, &length, sizeof(length)))
		return 0;
	end = at + (length >> 4) * 4;
	at += sizeof(struct tcphdr);
	for (int i = 0; i < TCP_OPTIONS_BYTES; i++) {
		if (at + sizeof(option) > end || bpf_skb_load_bytes(skb, at, option, sizeof(option)) ||
		    option[0] == TCP_OPTION_END)
			break;
		if (option[0] == TCP_OPTION_TIME)
			return bpf_skb_load_bytes(skb, at + 2, &time, sizeof(time)) ? 0 : bpf_ntohl(time);
		if (option[0] != TCP_OPTION_NONE && option[1] < 2)
			break;
		at += option[0] == TCP_OPTION_NONE ? 1 : option[1];
	}
	return 0;
}

/* Likewise its sequence number. */
__noinline int tcp_sequence4(struct __sk_buff *skb, __u32 at)
{
	__be32 sequence = 0;

	if (at)
		bpf_skb_load_bytes(skb, at + TCP_SEQUENCE, &sequence, sizeof(sequence));
	return bpf_ntohl(sequence);
}

/*
 * Whether the remote will take a SYN with this sequence number and time for the begin of a connection, though there was
 * another one under the same name. An end that closed first remembers it for a minute or more, and believes only what
 * is later (RFC 1122, section 4.2.2.13, and RFC 6191). Within one pod the kernel sees to that; here it is one pod after
 * another, or ports of a pod, whose sequence numbers and clocks have nothing to do with each other. Not static for the
 * same reason as next_candidate4.
 */
__noinline int may_follow4(__u32 pod_fin, __u32 end_sequence, __u32 end_time, __u32 sequence, __u32 time)
{
	if (!pod_fin)
		return 1;
	if (time && end_time)
		return (__s32)(time - end_time) > 0;
	return (__s32)(sequence - end_sequence) > 0;
}

/*
 * The port, in network order, that a pod's flow has under an address of ours, or -1 if it has none. The most
 * distant candidate is tried first: mostly only one flow has left its mark in the bucket, and has its row there.
 *
 * Not static: the verifier looks at its loop once, instead of once for each way that leads to each call.
 */
__noinline int find_port4(__u32 pod, __u32 remote, __u32 ports, __u32 kind, __u32 address)
{
	struct connection4 *connection;
	struct connection_key4 key;
	struct pod_flow4 flow;
	struct probe *probe;
	__u32 hash, bucket, furthest;

	unpack_flow4(&flow, pod, remote, ports, kind);
	hash = pod_flow_hash(&flow);
	bucket = bucket_of(hash);
	probe = bpf_map_lookup_elem(&probes4, &bucket);
	if (!probe || !probe->rows)
		return -1;
	furthest = probe->furthest;
	connection_key4(&key, &flow, address, 0);
	for (__u32 i = 0; i < CANDIDATES_MAX; i++) {
		if (i > furthest)
			break;
		key.port = next_candidate4(ports, kind, hash, furthest - i);
		connection = bpf_map_lookup_elem(&connections4, &key);
		if (connection && is_of_flow4(connection, &flow))
			return key.port;
	}
	return -1;
}

/*
 * The row at the most distant candidate, if it is this flow's: where find_port4 looks first and mostly finds it. Here
 * it costs one look-up of the row instead of two, which established flows pay for each packet.
 */
static __always_inline struct connection4 *likely_connection4(const struct pod_flow4 *flow, __be32 address,
							      struct connection_key4 *key)
{
	__u32 hash = pod_flow_hash(flow), bucket = bucket_of(hash);
	struct probe *probe = bpf_map_lookup_elem(&probes4, &bucket);
	struct connection4 *connection;

	if (!probe || !probe->rows)
		return 0;
	connection_key4(key, flow, address, candidate_port(flow, hash, probe->furthest));
	connection = bpf_map_lookup_elem(&connections4, key);
	return connection && is_of_flow4(connection, flow) ? connection : 0;
}

/* The connection of a pod's flow under the uplink's address, or else under its former one; and its key. */
static __always_inline struct connection4 *
find_connection4(const struct pod_flow4 *flow, const struct uplink4 *uplink, struct connection_key4 *key)
{
	__be32 address = bytes4(uplink->address);
	struct connection4 *connection = likely_connection4(flow, address, key);
	int port;

	if (connection)
		return connection;
	port = find_port4(flow->pod, flow->remote, ports_of(flow), kind_of(flow), address);
	if (port < 0) {
		address = bytes4(uplink->former);
		if (!address)
			return 0;
		port = find_port4(flow->pod, flow->remote, ports_of(flow), kind_of(flow), address);
	}
	if (port < 0)
		return 0;
	connection_key4(key, flow, address, port);
	return bpf_map_lookup_elem(&connections4, key);
}

/*
 * A socket of this node that speaks under the name of the connection, or listens there. `ports` are that under the
 * address, and the remote's above it. Not static for the same reason as next_candidate4.
 */
__noinline int is_host_socket4(struct __sk_buff *skb, __u32 address, __u32 remote, __u32 ports,
			       __u32 protocol)
{
	/* The part of struct bpf_sock_tuple that is IPv4's. */
	struct {
		__be32 saddr, daddr;
		__be16 sport, dport;
	} tuple = {.saddr = remote, .daddr = address, .sport = ports >> 16, .dport = ports};
	struct bpf_sock *socket;

	if (protocol == IPPROTO_TCP)
		socket = bpf_sk_lookup_tcp(skb, (void *)&tuple, sizeof(tuple), BPF_F_CURRENT_NETNS, 0);
	else if (protocol == IPPROTO_UDP)
		socket = bpf_sk_lookup_udp(skb, (void *)&tuple, sizeof(tuple), BPF_F_CURRENT_NETNS, 0);
	else
		return 0;
	if (!socket)
		return 0;
	bpf_sk_release(socket);
	return 1;
}

/*
 * One row more in the bucket, at most `index` along its flow's candidates. Before the row itself. Not static, as what
 * follows, for the same reason as next_candidate4.
 */
__noinline int raise_probe(__u32 bucket, __u32 index)
{
	struct probe *probe = bpf_map_lookup_elem(&probes4, &bucket);

	if (!probe)
		return 0;
	bpf_spin_lock(&probe->lock);
	if (probe->furthest < index)
		probe->furthest = index;
	probe->rows++;
	bpf_spin_unlock(&probe->lock);
	return 0;
}

/* One row less, which is gone. */
__noinline int lower_probe(__u32 bucket)
{
	struct probe *probe = bpf_map_lookup_elem(&probes4, &bucket);

	/* NO_BUCKET is none. */
	if (!probe)
		return 0;
	bpf_spin_lock(&probe->lock);
	if (probe->rows)
		probe->rows--;
	if (!probe->rows)
		probe->furthest = 0;
	bpf_spin_unlock(&probe->lock);
	return 0;
}

/* Has the row looked after by `expire`. Without that it would stay for ever: it is taken back. */
static __always_inline int watch_connection4(const struct expiring4 *entry)
{
	if (!bpf_map_push_elem(&expiring4, entry, 0))
		return 0;
	bpf_map_delete_elem(&connections4, &entry->key);
	return -1;
}

/* Tells `sweep` that there is no room: it then takes closed connections first. */
__noinline int press(void)
{
	__u32 only = 0;
	struct expiry *state = bpf_map_lookup_elem(&expiry, &only);

	if (state)
		state->pressed = PRESSED_FULL;
	return 0;
}

/* Of a connection whose first packet has these flags. Without a branch: the verifier would follow both to the end. */
static __always_inline __u8 first_state(__u8 tcp_flags)
{
	_Static_assert(CONNECTION_NEW == 0 && TCP_RST == 4, "the state is a flag times a number");
	return (tcp_flags & TCP_RST) / TCP_RST * CONNECTION_CLOSED;
}

static __always_inline void new_connection4(struct connection4 *row, const struct pod_flow4 *flow,
					    __u32 ifindex, __u32 bucket)
{
	__builtin_memset(row, 0, sizeof(*row));
	row->state = first_state(flow->tcp_flags);
	__builtin_memcpy(row->pod, &flow->pod, sizeof(flow->pod));
	row->pod_port = flow->pod_port;
	row->ifindex = ifindex;
	row->bucket = bucket;
	row->seen_ns = row->since_ns = bpf_ktime_get_ns();
}

/* What open_port4 returns where it opened nothing: why, and at which candidate a connection has ended, if there is one. */
static __always_inline int refused(enum verdict why, __u32 ended)
{
	return -(why | ended << 8);
}

static __always_inline enum verdict why_refused(int result)
{
	return -result & 0xff;
}

static __always_inline __u32 ended_candidate(int result)
{
	return (__u32)-result >> 8;
}

/*
 * Opens a connection under the address of the interface at hand, or finds the one that another processor just opened
 * for the same flow. Its port in network order; or a negative `refused`: there is no room, or no port towards this
 * remote. Then one that has ended may give its port away: of those that this flow might have had, the one that ended
 * first, but after all those that it may follow. Where none of the nearest is free, and one of them ended some time ago,
 * that one will do: towards a remote that many short connections have been to, all ports are used, and a search
 * through all would cost each new one more than all the rest of it. Not static for the same reason as find_port4.
 */
__noinline int open_port4(struct __sk_buff *skb, __u32 pod, __u32 remote, __u32 ports, __u32 kind)
{
	__u32 ifindex = skb->ifindex, hash, bucket;
	enum verdict why = VERDICT_DROP_MASQ_PORTS;
	struct connection4 row, *connection;
	__u32 tcp, sequence, time;
	__u64 ended_ns, when;
	struct expiring4 entry = {};
	struct connection_key4 *key = &entry.key;
	struct pod_flow4 flow;
	struct uplink4 *uplink;
	__u32 ended, candidate;
	long error;

	unpack_flow4(&flow, pod, remote, ports, kind);
	hash = pod_flow_hash(&flow);
	bucket = bucket_of(hash);
	uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);
	if (!uplink)
		return refused(why, CANDIDATES_MAX);
	new_connection4(&row, &flow, ifindex, bucket);
	connection_key4(key, &flow, bytes4(uplink->address), 0);
	tcp = flow.protocol == IPPROTO_TCP ? ETH_HLEN + flow.header : 0;
	sequence = tcp_sequence4(skb, tcp);
	time = tcp_time4(skb, tcp);
	/* Nothing has ended later. The verifier knows neither value: it would follow each through the loop. */
	ended_ns = row.seen_ns + UNFIT_NS;
	ended = next_candidate4(ports, kind, hash, CANDIDATES_MAX) >> 16;
	for (__u32 i = 0; i < CANDIDATES_MAX; i++) {
		if (i && !flow.free_port)
			break;
		if (i >= CANDIDATES_NEAR && (__s64)(row.seen_ns - ended_ns) > (__s64)ENDED_NS)
			break;
		candidate = next_candidate4(ports, kind, hash, i);
		key->port = candidate;
		connection = bpf_map_lookup_elem(&connections4, key);
		if (connection) {
			if (is_of_flow4(connection, &flow))
				return key->port;
			when = connection->seen_ns;
			if (!may_follow4(connection->pod_fin, connection->end_sequence, connection->end_time,
					 sequence, time))
				when += UNFIT_NS;
			if (connection->state == CONNECTION_CLOSED && when < ended_ns) {
				ended_ns = when;
				ended = candidate >> 16;
			}
			continue;
		}
		if (why == VERDICT_DROP_MASQ_FULL)
			continue;
		if (key->protocol == IPPROTO_UDP && key->port == config.tunnel_port)
			continue;
		if (is_host_socket4(skb, bytes4(key->address), remote,
				    key->port | (__u32)key->remote_port << 16, key->protocol))
			continue;
		raise_probe(bucket, i);
		error = bpf_map_update_elem(&connections4, key, &row, BPF_NOEXIST);
		if (!error && !watch_connection4(&entry))
			return key->port;
		lower_probe(bucket);
		if (error != -EEXIST) {
			press();
			why = VERDICT_DROP_MASQ_FULL;
			continue;
		}
		connection = bpf_map_lookup_elem(&connections4, key);
		if (connection && is_of_flow4(connection, &flow))
			return key->port;
	}
	return refused(why, ended);
}

/*
 * The connection at a flow's candidate, which has ended, gives its name to the flow. Its port in network order, or -1 if
 * it was another processor's to have. The candidate's index comes in the highest byte of `kind`.
 */
__noinline int take_over_port4(struct __sk_buff *skb, __u32 pod, __u32 remote, __u32 ports, __u32 kind)
{
	__u32 ifindex = skb->ifindex, hash, bucket, former_bucket = NO_BUCKET, index = kind >> 24;
	struct connection4 row, *connection;
	struct connection_key4 key;
	struct pod_flow4 flow;
	struct uplink4 *uplink;
	int taken = 0;

	unpack_flow4(&flow, pod, remote, ports, kind);
	hash = pod_flow_hash(&flow);
	bucket = bucket_of(hash);
	uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);
	if (!uplink)
		return -1;
	connection_key4(&key, &flow, bytes4(uplink->address), candidate_port(&flow, hash, index));
	connection = bpf_map_lookup_elem(&connections4, &key);
	if (!connection)
		return -1;
	new_connection4(&row, &flow, ifindex, bucket);
	raise_probe(bucket, index);
	bpf_spin_lock(&connection->lock);
	if (connection->state == CONNECTION_CLOSED) {
		former_bucket = connection->bucket;
		connection->state = row.state;
		__builtin_memcpy(connection->pod, row.pod, sizeof(row.pod));
		connection->pod_port = row.pod_port;
		connection->replied = 0;
		connection->pod_fin = 0;
		connection->remote_fin = 0;
		connection->on_stack = 0;
		connection->ifindex = row.ifindex;
		connection->bucket = row.bucket;
		connection->seen_ns = row.seen_ns;
		connection->since_ns = row.since_ns;
		taken = 1;
	}
	bpf_spin_unlock(&connection->lock);
	lower_probe(taken ? former_bucket : bucket);
	return taken || is_of_flow4(connection, &flow) ? key.port : -1;
}

/* Opens a connection, or says with the verdict why it cannot be. */
static __always_inline struct connection4 *open_connection4(struct __sk_buff *skb,
							    const struct pod_flow4 *flow, __be32 address,
							    struct connection_key4 *key,
							    enum verdict *verdict)
{
	int port = -1;

	*verdict = VERDICT_DROP_MASQ_PORTS;
	/* Once more if another processor was faster with the one that had ended. */
	for (int i = 0; i < 2; i++) {
		__u32 ended;

		port = open_port4(skb, flow->pod, flow->remote, ports_of(flow), kind_of(flow));
		if (port >= 0)
			break;
		*verdict = why_refused(port);
		ended = ended_candidate(port);
		if (ended >= CANDIDATES_MAX)
			return 0;
		port = take_over_port4(skb, flow->pod, flow->remote, ports_of(flow),
				       kind_of(flow) | ended << 24);
		if (port >= 0)
			break;
	}
	if (port < 0)
		return 0;
	connection_key4(key, flow, address, port);
	return bpf_map_lookup_elem(&connections4, key);
}

/* The pod's FIN: what of it the remote will remember, should it be the one that closed first. */
static __always_inline void note_end4(struct __sk_buff *skb, const struct packet4 *packet,
				      struct connection4 *connection)
{
	__u32 at = ETH_HLEN + packet->header;
	__u8 length = 0;

	bpf_skb_load_bytes(skb, at + TCP_LENGTH, &length, sizeof(length));
	connection->end_sequence = tcp_sequence4(skb, at) + skb->len - at - (length >> 4) * 4 + 1;
	connection->end_time = tcp_time4(skb, at);
}

/* Counts a packet of the connection in: its state, and that it lives. */
static __always_inline void see_connection4(struct connection4 *connection, __u8 protocol, __u8 tcp_flags,
					    int from_pod, int may_reopen)
{
	__u32 state = connection->state;
	__u64 now;

	/* To some milliseconds, which is all that a timeout needs and costs a tenth; a change of state is exact. */
	now = bpf_ktime_get_coarse_ns();
	if ((__s64)(now - connection->seen_ns) > (__s64)SECOND_NS && state != CONNECTION_CLOSED)
		connection->seen_ns = now;
	if (!from_pod && !connection->replied)
		connection->replied = 1;
	if (protocol != IPPROTO_TCP) {
		if (state == CONNECTION_NEW && from_pod && connection->replied)
			connection->state = CONNECTION_ESTABLISHED;
		return;
	}
	if ((tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN && may_reopen) {
		/* A new connection with the ports of one that has ended. */
		if (state == CONNECTION_CLOSED || state == CONNECTION_CLOSING) {
			now = bpf_ktime_get_ns();
			bpf_spin_lock(&connection->lock);
			connection->replied = connection->pod_fin = connection->remote_fin = 0;
			connection->state = CONNECTION_NEW;
			connection->seen_ns = connection->since_ns = now;
			bpf_spin_unlock(&connection->lock);
		}
		return;
	}
	if (tcp_flags & TCP_RST) {
		if (state != CONNECTION_CLOSED) {
			connection->seen_ns = bpf_ktime_get_ns();
			connection->state = CONNECTION_CLOSED;
		}
		return;
	}
	if (tcp_flags & TCP_FIN) {
		if (from_pod)
			connection->pod_fin = 1;
		else
			connection->remote_fin = 1;
		if (connection->pod_fin && connection->remote_fin) {
			if (state != CONNECTION_CLOSED) {
				connection->seen_ns = bpf_ktime_get_ns();
				connection->state = CONNECTION_CLOSED;
			}
		} else if (state != CONNECTION_CLOSING) {
			connection->state = CONNECTION_CLOSING;
		}
		return;
	}
	/* A reset that the pod did not believe leaves the connection open. */
	if (from_pod && connection->replied && !connection->pod_fin &&
	    (state == CONNECTION_NEW || (state == CONNECTION_CLOSED && !connection->remote_fin))) {
		connection->seen_ns = bpf_ktime_get_ns();
		connection->state = CONNECTION_ESTABLISHED;
	}
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline __u32 word_sum(__be32 value)
{
	return (value & 0xffff) + (value >> 16);
}

/* The checksum `check` over data in which `before` became `after` (RFC 1624). */
static __always_inline __u16 recheck(__u16 check, __u32 before, __u32 after)
{
	return ~fold((__u16)~check + word_sum(~before) + word_sum(after));
}

/*
 * The id that a fragment from a pod has outside: two pods may use the same one at a time, and then have to differ.
 */
static __always_inline __be16 outside_id(__be16 id, __be32 pod)
{
	return id ^ (__u16)spread(pod ^ config.masq_seed);
}

/* Offset of the checksum that covers the addresses and ports, from the transport header on; 0 if there is none. */
static __always_inline __u32 checksum_offset(__u8 protocol)
{
	switch (protocol) {
	case IPPROTO_TCP:
		return TCP_CHECKSUM;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_DCCP:
		return UDP_CHECKSUM;
	}
	return 0;
}

/* Writes a port, `at` bytes into the transport header. Nearly all have it at hand: no call is needed. */
static __always_inline int store_port(struct __sk_buff *skb, const struct packet4 *packet, __u32 at,
				      __be16 port)
{
	void *place = packet_data(skb) + ETH_HLEN + sizeof(struct iphdr) + at;

	if (packet->header != sizeof(struct iphdr) || place + sizeof(port) > packet_end(skb))
		return bpf_skb_store_bytes(skb, ETH_HLEN + packet->header + at, &port, sizeof(port), 0);
	*(__be16 *)place = port;
	return 0;
}

/*
 * Changes one end of a packet: the address at `address_at` bytes of the IP header from `from` to `to`, the port from
 * `port` to `to_port`. The checksum of a packet that the network card still has to complete is changed where it
 * must be, and that of each segment of an aggregate. Nonzero if the packet may be half changed.
 */
static __always_inline int translate4(struct __sk_buff *skb, const struct packet4 *packet, __u32 address_at,
				      __be32 from, __be32 to, __be16 port, __be16 to_port)
{
	__u32 transport = ETH_HLEN + packet->header;
	struct iphdr *ip;

	if (packet->fragment != FRAGMENT_LATER) {
		__u32 check = checksum_offset(packet->protocol);
		__u32 port_at = address_at == offsetof(struct iphdr, saddr) ? 0 : 2;
		__u64 mangled = packet->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

		if (packet->protocol == IPPROTO_ICMP) {
			check = ICMP_CHECKSUM;
			port_at = ICMP_ECHO_ID;
		} else if (check && bpf_l4_csum_replace(skb, transport + check, from, to,
							BPF_F_PSEUDO_HDR | mangled | sizeof(to))) {
			return -1;
		}
		if (port != to_port &&
		    (bpf_l4_csum_replace(skb, transport + check, port, to_port, mangled | sizeof(port)) ||
		     store_port(skb, packet, port_at, to_port)))
			return -1;
	}
	ip = packet_data(skb) + ETH_HLEN;
	if ((void *)(ip + 1) > packet_end(skb))
		return -1;
	ip->check = recheck(ip->check, from, to);
	if (address_at != offsetof(struct iphdr, saddr)) {
		ip->daddr = to;
		return 0;
	}
	ip->saddr = to;
	if (packet->fragment) {
		__be16 id = outside_id(ip->id, from);

		ip->check = recheck(ip->check, ip->id, id);
		ip->id = id;
	}
	return 0;
}

static __always_inline int translate_source4(struct __sk_buff *skb, const struct packet4 *packet,
					     const struct connection_key4 *key)
{
	return translate4(skb, packet, offsetof(struct iphdr, saddr), packet->source, bytes4(key->address),
			  packet->source_port, key->port);
}

static __always_inline int translate_destination4(struct __sk_buff *skb, const struct packet4 *packet,
						  const struct connection4 *connection)
{
	return translate4(skb, packet, offsetof(struct iphdr, daddr), packet->destination,
			  bytes4(connection->pod), packet->destination_port, connection->pod_port);
}

static __always_inline __u8 tcp_flags_of(struct __sk_buff *skb, const struct packet4 *packet)
{
	__u8 flags = 0;

	if (packet->protocol == IPPROTO_TCP &&
	    bpf_skb_load_bytes(skb, ETH_HLEN + packet->header + TCP_FLAGS, &flags, sizeof(flags)))
		return 0;
	return flags;
}

/* Whether an ICMP packet is the answer to an echo. */
static __always_inline int is_echo_reply(struct __sk_buff *skb, const struct packet4 *packet)
{
	__u8 type = ICMP_ECHO;

	return packet->protocol == IPPROTO_ICMP &&
	       !bpf_skb_load_bytes(skb, ETH_HLEN + packet->header, &type, sizeof(type)) &&
	       type == ICMP_ECHO_REPLY;
}

/* The flow of a packet that a pod sends. The identifier of an echo is the pod's side of it. */
static __always_inline void flow_from_pod4(struct pod_flow4 *flow, struct __sk_buff *skb,
					   const struct packet4 *packet)
{
	flow->pod = packet->source;
	flow->remote = packet->destination;
	flow->pod_port = packet->source_port;
	flow->remote_port = packet->protocol == IPPROTO_ICMP ? 0 : packet->destination_port;
	flow->protocol = packet->protocol;
	flow->tcp_flags = tcp_flags_of(skb, packet);
	flow->free_port = has_free_port(flow->protocol, flow->pod_port);
	flow->header = packet->header;
}

/* The flow of a packet for a pod's own address, or for ours in its place. */
static __always_inline void flow_to_pod4(struct pod_flow4 *flow, struct __sk_buff *skb,
					 const struct packet4 *packet)
{
	flow->pod = packet->destination;
	flow->remote = packet->source;
	flow->pod_port = packet->destination_port;
	flow->remote_port = packet->protocol == IPPROTO_ICMP ? 0 : packet->source_port;
	flow->protocol = packet->protocol;
	flow->tcp_flags = tcp_flags_of(skb, packet);
	flow->free_port = has_free_port(flow->protocol, flow->pod_port);
	flow->header = packet->header;
}

static __always_inline int is_multicast4(__be32 address)
{
	return (address & MULTICAST4_MASK) == MULTICAST4;
}

/* Whether flows of pods to this address keep their source: --masq-exclude. */
static __always_inline int is_excluded4(__be32 address)
{
	struct excluded4 key = {.prefix_length = 32};

	__builtin_memcpy(key.address, &address, sizeof(address));
	return bpf_map_lookup_elem(&excluded4, &key) != 0;
}

/* The connection under which a flow from outside reached a pod at its own address. */
static __always_inline struct connection4 *inbound_connection4(const struct pod_flow4 *flow)
{
	struct connection_key4 key;

	connection_key4(&key, flow, flow->pod, flow->pod_port);
	return bpf_map_lookup_elem(&connections4, &key);
}

/* A packet from outside for a pod at its own address: the pod's replies are to keep it. */
static __always_inline void note_inbound4(struct __sk_buff *skb, const struct packet4 *packet)
{
	struct expiring4 entry = {};
	struct connection4 row, *connection;
	struct pod_flow4 flow;

	if (packet->fragment == FRAGMENT_LATER || packet->icmp_error || is_echo_reply(skb, packet))
		return;
	flow_to_pod4(&flow, skb, packet);
	connection = inbound_connection4(&flow);
	if (connection) {
		see_connection4(connection, flow.protocol, flow.tcp_flags, 0, 1);
		return;
	}
	if (flow.tcp_flags & TCP_RST)
		return;
	new_connection4(&row, &flow, skb->ifindex, NO_BUCKET);
	row.replied = 1;
	row.on_stack = 1;
	connection_key4(&entry.key, &flow, flow.pod, flow.pod_port);
	if (!bpf_map_update_elem(&connections4, &entry.key, &row, BPF_NOEXIST))
		watch_connection4(&entry);
}

/*
 * Our address for a fragment that has no ports: what the first one got, which is its own where that kept it, or else
 * the uplink's.
 */
static __always_inline __be32 later_address4(struct __sk_buff *skb, const struct packet4 *packet,
					     const struct uplink4 *uplink)
{
	struct datagram4 *datagram;
	struct fragment4 key;

	if (fragment_key4(&key, skb, packet))
		return bytes4(uplink->address);
	datagram = datagram_of4(&key);
	return datagram ? bytes4(datagram->address) : bytes4(uplink->address);
}

/*
 * Whether this packet leaves with the address that it has, though no connection is known. Between the outside and a pod
 * elsewhere, a connection begins with its first packet only: what was there before us goes on as it is, and answers
 * are none.
 */
static __always_inline int keeps_address4(struct __sk_buff *skb, const struct packet4 *packet,
					  const struct pod_flow4 *flow)
{
	if (is_excluded4(packet->destination) || is_echo_reply(skb, packet))
		return 1;
	return !is_local_pod4(packet->source) && packet->protocol == IPPROTO_TCP &&
	       (flow->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) != TCP_SYN;
}

/* What the stack sends from a pod to the outside, or from outside the network to a pod of another node. */
static __always_inline int to_outside4(struct __sk_buff *skb, const struct packet4 *packet,
				       enum verdict *verdict)
{
	__u32 ifindex = skb->ifindex;
	struct connection_key4 key;
	struct connection4 *connection;
	struct fragment4 fragment;
	struct pod_flow4 flow = {};
	struct uplink4 *uplink;

	uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);
	/* What is marked so, kube-proxy masquerades; and a packet with our own address needs nothing. */
	if (!uplink || skb->vlan_present || (skb->mark & KUBE_MASQUERADE_MARK) ||
	    packet->source == bytes4(uplink->address) || is_multicast4(packet->destination))
		return NEXT;
	if (packet->fragment == FRAGMENT_LATER) {
		if (is_excluded4(packet->destination))
			return NEXT;
		connection_key4(&key, &flow, later_address4(skb, packet, uplink), 0);
		if (bytes4(key.address) == packet->source)
			return NEXT;
		*verdict = VERDICT_MASQUERADED;
		if (!translate_source4(skb, packet, &key))
			return NEXT;
		*verdict = VERDICT_DROP_FAILED;
		return DROP;
	}
	flow_from_pod4(&flow, skb, packet);
	connection = find_connection4(&flow, uplink, &key);
	if (!connection) {
		connection = inbound_connection4(&flow);
		if (connection)
			see_connection4(connection, flow.protocol, flow.tcp_flags, 1, 0);
		if (connection || keeps_address4(skb, packet, &flow)) {
			if (packet->fragment && !fragment_key4(&fragment, skb, packet))
				note_fragments4(&fragment, packet->source);
			return NEXT;
		}
		connection = open_connection4(skb, &flow, bytes4(uplink->address), &key, verdict);
		if (!connection)
			return DROP;
	}
	/* Not as it entered, or entered where nobody saw it: only the stack knows how to undo that. */
	if (watches_flows() && !connection->on_stack && skb->tc_index != flow_stamp(packet))
		connection->on_stack = 1;
	if (flow.tcp_flags & TCP_FIN)
		note_end4(skb, packet, connection);
	see_connection4(connection, flow.protocol, flow.tcp_flags, 1, 1);
	if (packet->fragment && bytes4(key.address) != bytes4(uplink->address) &&
	    !fragment_key4(&fragment, skb, packet))
		note_fragments4(&fragment, bytes4(key.address));
	*verdict = VERDICT_MASQUERADED;
	if (!translate_source4(skb, packet, &key))
		return NEXT;
	*verdict = VERDICT_DROP_FAILED;
	return DROP;
}

static __always_inline int may_be_ours(const struct packet4 *packet)
{
	__u16 port = bpf_ntohs(packet->destination_port);

	return !has_free_port(packet->protocol, packet->destination_port) ||
	       (port >= config.masq_port_min && port <= config.masq_port_max);
}

/* An answer of a pod elsewhere that goes on to the outside is not to be masqueraded there in its turn. */
static __always_inline void mark_given_back4(struct __sk_buff *skb, __be32 destination)
{
	if (!in_network4(destination))
		skb->tc_index = GIVEN_BACK;
}

/* Hands a packet whose destination is a pod's again to that pod, if the stack need not see it. */
static __always_inline int return_to_pod4(struct __sk_buff *skb, struct packet4 *packet,
					  const struct connection4 *connection, enum verdict *verdict)
{
	struct endpoint4 *endpoint;

	packet->destination = bytes4(connection->pod);
	mark_given_back4(skb, packet->destination);
	if (!packet->icmp_error) {
		packet->destination_port = connection->pod_port;
		if (packet->protocol == IPPROTO_ICMP)
			packet->source_port = connection->pod_port;
	}
	*verdict = VERDICT_MASQUERADED;
	/* All fragments of a packet take one way, and only the stack can make them fit a smaller link. */
	if (connection->on_stack || packet->fragment)
		return NEXT;
	endpoint = endpoint_of4(packet->destination);
	if (!endpoint || does_not_fit4(skb, ETH_HLEN, packet, endpoint->mtu) != VERDICT_UNRELATED)
		return NEXT;
	return deliver4(skb, endpoint, VERDICT_DELIVERED, verdict);
}

/* Whether the packet is for the address by which pods leave through the interface at hand. */
static __always_inline int is_for_uplink4(struct __sk_buff *skb, const struct packet4 *packet)
{
	__u32 ifindex = skb->ifindex;
	struct uplink4 *uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);

	return uplink && (packet->destination == bytes4(uplink->address) ||
			  (bytes4(uplink->former) && packet->destination == bytes4(uplink->former)));
}

/*
 * A first fragment for our address: says whose the others are, this node's own if `pod` is 0. Nonzero if it was sent
 * in once more, with those that have waited for it.
 */
static __always_inline int gather4(struct __sk_buff *skb, const struct packet4 *packet, __be32 pod)
{
	struct fragment4 key;

	if (!is_for_uplink4(skb, packet) || fragment_key4(&key, skb, packet))
		return 0;
	note_fragments4(&key, pod);
	return release4(skb, &key);
}

/* A fragment without ports for our address. */
static __always_inline int later_from_outside4(struct __sk_buff *skb, const struct packet4 *packet,
					       enum verdict *verdict)
{
	struct datagram4 *datagram;
	struct fragment4 key;
	__be32 pod;

	if (!is_for_uplink4(skb, packet) || fragment_key4(&key, skb, packet))
		return NEXT;
	datagram = datagram_of4(&key);
	if (!datagram) {
		if (hold4(skb, &key, packet->length)) {
			datagram = datagram_of4(&key);
		} else {
			*verdict = VERDICT_HELD;
			return DROP;
		}
	}
	pod = datagram ? bytes4(datagram->address) : 0;
	if (!pod)
		return NEXT;
	mark_given_back4(skb, pod);
	*verdict = VERDICT_MASQUERADED;
	if (!translate4(skb, packet, offsetof(struct iphdr, daddr), packet->destination, pod, 0, 0))
		return NEXT;
	*verdict = VERDICT_DROP_FAILED;
	return DROP;
}

/* The packet that an ICMP error is about. */
struct about4 {
	struct iphdr ip;
	struct packet4 packet;
	__u32 offset; /* of its IP header */
};

static __always_inline int read_about4(struct __sk_buff *skb, const struct packet4 *error,
				       struct about4 *about)
{
	struct packet4 *packet = &about->packet;
	struct iphdr *ip = &about->ip;

	about->offset = ETH_HLEN + error->header + sizeof(struct icmp_header);
	if (bpf_skb_load_bytes(skb, about->offset, ip, sizeof(*ip)) || ip->version != 4 || ip->ihl < 5)
		return -1;
	__builtin_memset(packet, 0, sizeof(*packet));
	packet->source = ip->saddr;
	packet->destination = ip->daddr;
	packet->protocol = ip->protocol;
	packet->header = ip->ihl * 4;
	packet->fragment = fragment_of(ip);
	if (packet->fragment == FRAGMENT_LATER)
		return -1;
	return parse_ports(skb, about->offset + packet->header, packet) == PARSED ? 0 : -1;
}

/*
 * Changes one end of the packet within an ICMP error, as translate4 changes one of a packet, and the checksum of the
 * error with it: by what is changed within; but for the header, whose checksum makes up for the address.
 */
static __always_inline int translate_about4(struct __sk_buff *skb, const struct packet4 *error,
					    const struct about4 *about, __u32 address_at, __be32 from,
					    __be32 to, __be16 port, __be16 to_port)
{
	__u32 sum_at = ETH_HLEN + error->header + ICMP_CHECKSUM;
	__u32 transport = about->offset + about->packet.header;
	__u32 check_at = checksum_offset(about->packet.protocol);
	__u32 port_at = address_at == offsetof(struct iphdr, saddr) ? 0 : 2;
	__u16 header_check = recheck(about->ip.check, from, to), check, new_check;
	__be32 covered = from, now_covered = to;

	/* The checksum of ICMP does not cover addresses. */
	if (about->packet.protocol == IPPROTO_ICMP) {
		check_at = ICMP_CHECKSUM;
		port_at = ICMP_ECHO_ID;
		covered = now_covered = 0;
	}
	/* Of TCP there may be no more than the ports. */
	if (check_at && !bpf_skb_load_bytes(skb, transport + check_at, &check, sizeof(check)) &&
	    (check || about->packet.protocol != IPPROTO_UDP)) {
		new_check = recheck(recheck(check, covered, now_covered), port, to_port);
		if (!new_check && about->packet.protocol == IPPROTO_UDP)
			new_check = 0xffff;
		if (bpf_l4_csum_replace(skb, sum_at, check, new_check, sizeof(check)) ||
		    bpf_skb_store_bytes(skb, transport + check_at, &new_check, sizeof(new_check), 0))
			return -1;
	}
	if (port != to_port && (bpf_l4_csum_replace(skb, sum_at, port, to_port, sizeof(port)) ||
				bpf_skb_store_bytes(skb, transport + port_at, &to_port, sizeof(to_port), 0)))
		return -1;
	return bpf_skb_store_bytes(skb, about->offset + address_at, &to, sizeof(to), 0) ||
	       bpf_skb_store_bytes(skb, about->offset + offsetof(struct iphdr, check), &header_check,
				   sizeof(header_check), 0);
}

/* The packet's own address, after all helpers that may move it. */
static __always_inline int replace_address4(struct __sk_buff *skb, __u32 address_at, __be32 from, __be32 to)
{
	struct iphdr *ip = packet_data(skb) + ETH_HLEN;

	if ((void *)(ip + 1) > packet_end(skb))
		return -1;
	ip->check = recheck(ip->check, from, to);
	if (address_at == offsetof(struct iphdr, saddr))
		ip->saddr = to;
	else
		ip->daddr = to;
	return 0;
}

/* An ICMP error for our address: about a packet of a pod, perhaps. */
static __always_inline int error_from_outside4(struct __sk_buff *skb, struct packet4 *packet,
					       enum verdict *verdict)
{
	struct connection_key4 key;
	struct connection4 *connection;
	struct pod_flow4 flow = {};
	struct about4 about;

	if (read_about4(skb, packet, &about) || about.packet.source != packet->destination)
		return NEXT;
	flow.remote = about.packet.destination;
	flow.remote_port = about.packet.protocol == IPPROTO_ICMP ? 0 : about.packet.destination_port;
	flow.protocol = about.packet.protocol;
	connection_key4(&key, &flow, about.packet.source, about.packet.source_port);
	connection = bpf_map_lookup_elem(&connections4, &key);
	if (!connection || connection->state == CONNECTION_GONE)
		return NEXT;
	*verdict = VERDICT_DROP_FAILED;
	if (translate_about4(skb, packet, &about, offsetof(struct iphdr, saddr), about.packet.source,
			     bytes4(connection->pod), about.packet.source_port, connection->pod_port) ||
	    replace_address4(skb, offsetof(struct iphdr, daddr), packet->destination,
			     bytes4(connection->pod)))
		return DROP;
	return return_to_pod4(skb, packet, connection, verdict);
}

/*
 * An ICMP error that leaves by an uplink or the tunnel device: if it is about a packet for somebody behind our address,
 * neither it nor what is in it may show who that is. Exactly one end of such a packet is in the network.
 */
static __always_inline int error_to_outside4(struct __sk_buff *skb, const struct packet4 *packet,
					     enum verdict *verdict)
{
	__u32 ifindex = skb->ifindex;
	struct connection_key4 key;
	struct connection4 *connection;
	struct pod_flow4 flow = {};
	struct uplink4 *uplink;
	struct about4 about;

	uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);
	if (!uplink || skb->vlan_present || read_about4(skb, packet, &about) ||
	    in_network4(about.packet.destination) == in_network4(about.packet.source))
		return NEXT;
	flow.pod = about.packet.destination;
	flow.remote = about.packet.source;
	flow.pod_port = about.packet.destination_port;
	flow.remote_port = about.packet.protocol == IPPROTO_ICMP ? 0 : about.packet.source_port;
	flow.protocol = about.packet.protocol;
	connection = find_connection4(&flow, uplink, &key);
	if (!connection)
		return NEXT;
	*verdict = VERDICT_DROP_FAILED;
	if (translate_about4(skb, packet, &about, offsetof(struct iphdr, daddr), about.packet.destination,
			     bytes4(key.address), about.packet.destination_port, key.port))
		return DROP;
	if (in_network4(packet->source) == in_network4(flow.pod) &&
	    packet->source != bytes4(uplink->address) &&
	    replace_address4(skb, offsetof(struct iphdr, saddr), packet->source, bytes4(key.address)))
		return DROP;
	*verdict = VERDICT_MASQUERADED;
	return NEXT;
}

/* What arrives for this node, and may be an answer to whoever is behind its address. */
static __always_inline int from_outside4(struct __sk_buff *skb, struct packet4 *packet, enum verdict *verdict)
{
	struct connection4 *connection = 0;
	struct connection_key4 key;
	struct pod_flow4 flow;

	if (packet->icmp_error)
		return error_from_outside4(skb, packet, verdict);
	if (packet->fragment == FRAGMENT_LATER)
		return later_from_outside4(skb, packet, verdict);
	flow_to_pod4(&flow, skb, packet);
	if (may_be_ours(packet)) {
		connection_key4(&key, &flow, flow.pod, flow.pod_port);
		connection = bpf_map_lookup_elem(&connections4, &key);
		if (connection && connection->state == CONNECTION_GONE)
			connection = 0;
	}
	if (packet->fragment && gather4(skb, packet, connection ? bytes4(connection->pod) : 0)) {
		*verdict = VERDICT_RELEASED;
		return DROP;
	}
	if (!connection)
		return NEXT;
	see_connection4(connection, flow.protocol, flow.tcp_flags, 0, 0);
	if (translate_destination4(skb, packet, connection)) {
		*verdict = VERDICT_DROP_FAILED;
		return DROP;
	}
	return return_to_pod4(skb, packet, connection, verdict);
}

/* Of the type of service, what routes and rules look at. */
#define ROUTE_TOS 0x1c

/* The row of `ways4` that this flow has, or another one. */
static __always_inline struct way4 *way_of4(const struct pod_flow4 *flow)
{
	__u32 index = pod_flow_hash(flow) & (WAYS_MAX - 1);

	return bpf_map_lookup_elem(&ways4, &index);
}

/* A pod's packet for the outside that may go there past the stack. */
struct repeat4 {
	struct pod_flow4 flow;
	struct connection_key4 key;
	struct connection4
		*connection; /* that it takes up; 0 if the kernel has to be asked for its way first */
	struct way4 *way;
	__u64 now;
};

/* The connection of a packet that goes the same way as one of its flow did a moment ago; and its key. */
static __always_inline struct connection4 *
recent_connection4(struct __sk_buff *skb, const struct packet4 *packet, struct repeat4 *repeat)
{
	const struct pod_flow4 *flow = &repeat->flow;
	const struct way4 *way = repeat->way;
	__u32 differ = (bytes4(way->pod) ^ flow->pod) | (bytes4(way->remote) ^ flow->remote) |
		       (way->pod_port ^ flow->pod_port) | (way->remote_port ^ flow->remote_port) |
		       (way->protocol ^ flow->protocol) | (way->tos ^ (packet->tos & ROUTE_TOS)) |
		       (way->pod_ifindex ^ skb->ifindex);
	struct connection4 *connection;

	if (differ || repeat->now - way->at_ns >= WAY_NS || wire_length4(skb, ETH_HLEN, packet) > way->mtu)
		return 0;
	connection_key4(&repeat->key, flow, bytes4(way->address), way->port);
	connection = bpf_map_lookup_elem(&connections4, &repeat->key);
	return connection && is_of_flow4(connection, flow) && connection->ifindex == way->ifindex ? connection
												  : 0;
}

/* The same by the way that the kernel says, which is then remembered. */
static __always_inline struct connection4 *
routed_connection4(struct __sk_buff *skb, const struct packet4 *packet, struct repeat4 *repeat)
{
	const struct pod_flow4 *flow = &repeat->flow;
	struct bpf_fib_lookup route = {};
	struct way4 *way = repeat->way;
	struct connection4 *connection;
	struct uplink4 *uplink;
	__u32 ifindex;

	route.family = AF_INET;
	route.ipv4_src = packet->source;
	route.ipv4_dst = packet->destination;
	route.l4_protocol = packet->protocol;
	route.sport = packet->source_port;
	route.dport = packet->destination_port;
	route.tot_len = wire_length4(skb, ETH_HLEN, packet);
	route.tos = packet->tos & ROUTE_TOS;
	route.ifindex = skb->ifindex;
	if (bpf_fib_lookup(skb, &route, sizeof(route), 0) != BPF_FIB_LKUP_RET_SUCCESS ||
	    route.family != AF_INET)
		return 0;
	ifindex = route.ifindex;
	uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);
	if (!uplink)
		return 0;
	connection = find_connection4(flow, uplink, &repeat->key);
	if (!connection || connection->ifindex != ifindex)
		return 0;
	__builtin_memcpy(way->pod, &flow->pod, sizeof(flow->pod));
	__builtin_memcpy(way->remote, &flow->remote, sizeof(flow->remote));
	way->pod_port = flow->pod_port;
	way->remote_port = flow->remote_port;
	way->protocol = flow->protocol;
	/* `route` says something else there by now. */
	way->tos = packet->tos & ROUTE_TOS;
	way->port = repeat->key.port;
	__builtin_memcpy(way->address, repeat->key.address, sizeof(way->address));
	__builtin_memcpy(way->next_hop, &route.ipv4_dst, sizeof(route.ipv4_dst));
	way->pod_ifindex = skb->ifindex;
	way->ifindex = ifindex;
	way->mtu = route.mtu_result;
	way->at_ns = repeat->now;
	return connection;
}

/* Whether a pod's packet for the outside may go there past the stack, and what is known about it without the kernel. */
static __always_inline int may_repeat4(struct __sk_buff *skb, const struct packet4 *packet,
				       struct repeat4 *repeat)
{
	if ((config.fast_path != FAST_PATH_AUTO && config.fast_path != FAST_PATH_ALWAYS) ||
	    packet->fragment || packet->icmp_error || packet->header != sizeof(struct iphdr) ||
	    packet->ttl <= 1)
		return 0;
	flow_from_pod4(&repeat->flow, skb, packet);
	/* A connection begins on the stack, also where one with the same ports has been. */
	if ((repeat->flow.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return 0;
	repeat->way = way_of4(&repeat->flow);
	if (!repeat->way)
		return 0;
	repeat->now = bpf_ktime_get_coarse_ns();
	repeat->connection = recent_connection4(skb, packet, repeat);
	return 1;
}

/*
 * A pod's packet for the outside, at its interface: a flow that the stack has let through once goes out as it would
 * from there, past it. The kernel still says where to, by its routes and rules; of a flow that sends much, it is asked
 * every WAY_NS, as its answer takes longer than all the rest that is done here for a packet.
 */
static __always_inline int repeat4(struct __sk_buff *skb, const struct packet4 *packet,
				   struct repeat4 *repeat, enum verdict *verdict)
{
	struct bpf_redir_neigh next_hop = {};
	struct connection4 *connection = repeat->connection;
	struct iphdr *ip;

	*verdict = VERDICT_UNRELATED;
	if (!connection)
		connection = routed_connection4(skb, packet, repeat);
	if (!connection)
		return NEXT;
	*verdict = VERDICT_STACK_FLOW;
	if (connection->on_stack)
		return NEXT;
	if (repeat->flow.tcp_flags & TCP_FIN)
		note_end4(skb, packet, connection);
	see_connection4(connection, repeat->flow.protocol, repeat->flow.tcp_flags, 1, 0);
	*verdict = VERDICT_DROP_FAILED;
	if (translate_source4(skb, packet, &repeat->key))
		return DROP;
	ip = packet_data(skb) + ETH_HLEN;
	if ((void *)(ip + 1) > packet_end(skb))
		return DROP;
	decrement_ttl(ip);
	skb->tc_index = 0;
	*verdict = VERDICT_REPEATED;
	next_hop.nh_family = AF_INET;
	next_hop.ipv4_nh = bytes4(repeat->way->next_hop);
	return bpf_redirect_neigh(repeat->way->ifindex, &next_hop, sizeof(next_hop), 0);
}

/* Which of a flow's candidates a port in network order is; CANDIDATES_MAX if none. Not static, as find_port4. */
__noinline int candidate_index4(__u32 pod, __u32 remote, __u32 ports, __u32 kind, __u32 port)
{
	struct pod_flow4 flow;
	__u32 hash;

	unpack_flow4(&flow, pod, remote, ports, kind);
	hash = pod_flow_hash(&flow);
	for (__u32 i = 0; i < CANDIDATES_MAX; i++)
		if ((__be16)next_candidate4(ports, kind, hash, i) == (__be16)port)
			return i;
	return CANDIDATES_MAX;
}

/*
 * Takes a row of a former table, at `at` of the packet, into this one, unless its flow could not be found there. Returns
 * whether there was one. Not static for the same reason as next_candidate4.
 */
__noinline int restore_next4(struct __sk_buff *skb, __u32 at)
{
	struct pod_flow4 flow = {};
	struct connection4 *row;
	struct expiring4 entry = {};
	struct saved4 saved;
	__u32 index;

	if (bpf_skb_load_bytes(skb, at, &saved, sizeof(saved)))
		return 0;
	row = &saved.connection;
	entry.key = saved.key;
	flow.pod = bytes4(row->pod);
	flow.remote = bytes4(saved.key.remote);
	flow.pod_port = row->pod_port;
	flow.remote_port = saved.key.remote_port;
	flow.protocol = saved.key.protocol;
	if (row->bucket == NO_BUCKET) {
		if (!bpf_map_update_elem(&connections4, &saved.key, row, BPF_NOEXIST))
			watch_connection4(&entry);
		return 1;
	}
	row->bucket = bucket_of(pod_flow_hash(&flow));
	index = candidate_index4(flow.pod, flow.remote, ports_of(&flow), kind_of(&flow), saved.key.port);
	if (index >= CANDIDATES_MAX)
		return 1;
	raise_probe(row->bucket, index);
	if (bpf_map_update_elem(&connections4, &saved.key, row, BPF_NOEXIST) || watch_connection4(&entry))
		lower_probe(row->bucket);
	return 1;
}

/*
 * How long a connection lives without a packet. One that both sides have closed is kept for as long as the remote
 * may remember it, and its name goes to one that may follow it; unless half the table is in use.
 */
static __always_inline __u64 timeout_ns(__u8 protocol, const struct connection4 *connection, __u32 pressed)
{
	const volatile struct timeouts *timeouts = &config.timeouts;
	__u32 state = connection->state, seconds;

	if (state == CONNECTION_CLOSED && pressed == PRESSED_FULL)
		return 0;
	if (protocol == IPPROTO_TCP)
		seconds = state == CONNECTION_NEW           ? timeouts->tcp_new
			  : state == CONNECTION_ESTABLISHED ? timeouts->tcp_established
			  : state == CONNECTION_CLOSING     ? timeouts->tcp_closing
			  : connection->pod_fin && !pressed ? timeouts->tcp_time_wait
							    : timeouts->tcp_closed;
	else if (protocol == IPPROTO_UDP)
		seconds = state == CONNECTION_NEW ? timeouts->udp_new : timeouts->udp_established;
	else
		seconds = protocol == IPPROTO_ICMP ? timeouts->icmp : timeouts->other;
	return seconds * SECOND_NS;
}

/* Counts a connection that lives on. No branch for each state: the verifier would follow each through the loop. */
static __always_inline void take_census4(struct census4 *census, __u8 protocol, __u32 state, __u32 bucket)
{
	__u32 *counts = (__u32 *)census;
	__u32 row = protocol == IPPROTO_TCP    ? 0
		    : protocol == IPPROTO_UDP  ? 1
		    : protocol == IPPROTO_ICMP ? 2
					       : 3;
	struct probe *probe;

	row = row << 2 | (state & 3);
	/* What the compiler knows to be below 16, the verifier is to see as well. */
	asm volatile("" : "+r"(row));
	counts[row & 15]++;
	if (bucket == NO_BUCKET)
		return;
	probe = bpf_map_lookup_elem(&probes4, &bucket);
	if (probe && probe->furthest >= census->furthest)
		census->furthest = probe->furthest + 1;
}

/* All that were counted. */
static __always_inline __u32 connections_of(const struct census4 *census)
{
	const __u32 *counts = (const __u32 *)census;
	__u32 sum = 0;

#pragma unroll
	for (__u32 i = 0; i < 16; i++)
		sum += counts[i];
	return sum;
}

/* Whether its interface still lends the connection's address. One that lends none for the moment says nothing. */
static __always_inline int is_lent4(const struct connection_key4 *key, const struct connection4 *connection)
{
	__u32 ifindex = connection->ifindex;
	__be32 address = bytes4(key->address);
	struct uplink4 *uplink = bpf_map_lookup_elem(&uplinks4, &ifindex);

	return !uplink || connection->bucket == NO_BUCKET || address == bytes4(uplink->address) ||
	       address == bytes4(uplink->former);
}

/*
 * Looks at the connection that comes next, once a round, and removes it if it has ended. Returns whether all have been
 * looked at. Not static for the same reason as next_candidate4.
 */
__noinline int sweep_next4(__u64 now)
{
	__u32 only = 0, which = CENSUS_NEXT, bucket = NO_BUCKET;
	struct expiry *state = bpf_map_lookup_elem(&expiry, &only);
	struct census4 *next = bpf_map_lookup_elem(&census4, &which);
	struct connection4 *connection;
	struct expiring4 entry;
	__u64 timeout;
	int ended = 0;

	if (!state || bpf_map_pop_elem(&expiring4, &entry))
		return 1;
	if (entry.round == state->round) {
		bpf_map_push_elem(&expiring4, &entry, 0);
		return 1;
	}
	connection = bpf_map_lookup_elem(&connections4, &entry.key);
	if (!connection)
		return 0;
	timeout = timeout_ns(entry.key.protocol, connection, state->pressed);
	/* Its pod speaks under another name by now, and nobody answers to this one. */
	if (!is_lent4(&entry.key, connection) && timeout > config.timeouts.tcp_closing * SECOND_NS)
		timeout = config.timeouts.tcp_closing * SECOND_NS;
	bpf_spin_lock(&connection->lock);
	if ((__s64)(now - connection->seen_ns) >= (__s64)timeout) {
		connection->state = CONNECTION_GONE;
		bucket = connection->bucket;
		ended = 1;
	}
	bpf_spin_unlock(&connection->lock);
	if (ended) {
		bpf_map_delete_elem(&connections4, &entry.key);
		lower_probe(bucket);
		return 0;
	}
	entry.round = state->round;
	bpf_map_push_elem(&expiring4, &entry, 0);
	if (next)
		take_census4(next, entry.key.protocol, connection->state, connection->bucket);
	return 0;
}

/* One step of the sweep: some connections looked at, those that have ended removed. */
static int sweep(void *map, __u32 *only, struct expiry *state)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 which = CENSUS_NEXT;
	struct census4 *next = bpf_map_lookup_elem(&census4, &which);
	struct census4 *last;
	int at_end = 0;

	for (int i = 0; i < SWEEP_STEP && !at_end; i++)
		at_end = sweep_next4(now);
	if (at_end) {
		which = CENSUS_LAST;
		last = bpf_map_lookup_elem(&census4, &which);
		state->pressed = PRESSED_NOT;
		if (next && last) {
			if (connections_of(next) > config.masq_connections / 2)
				state->pressed = PRESSED_HALF;
			next->at_ns = now;
			*last = *next;
			__builtin_memset(next, 0, sizeof(*next));
		}
		/* New entries have the round 0. */
		state->round = state->round + 1 ? state->round + 1 : 1;
	}
	bpf_timer_start(&state->timer, at_end ? SECOND_NS : SWEEP_PAUSE_NS, 0);
	return 0;
}

#endif
