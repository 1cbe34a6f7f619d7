/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The contract between the programs and the control plane. Every struct, enum and limit that crosses the
 * kernel border is written here, once; the control plane reads it from the object's BTF, so nothing of it is
 * typed a second time.
 *
 * An address is four bytes and a MAC six, in the order in which people write them, so that `bpftool map dump`
 * can be read; __be types are in network order, everything else in the machine's. Padding is a field. What
 * belongs to IPv4 ends in 4, so that IPv6 fits beside it.
 */
#ifndef TWILL_ABI_H
#define TWILL_ABI_H

#include <linux/bpf.h>
#include <linux/types.h>

enum limit {
	SUBNETS_MAX = 65536,
	ENDPOINTS_MAX = 65536,
	INTERFACES_MAX = 4096,
	FLOWS_MAX = 65536,
	INBOUND_MAX = 131072,
	/* Source ports of tunnel packets that are told apart, a power of two. */
	IN_DEVICE_MAX = 4096,
	/* Ticks of the kernel's clock, begun and not whole, for which a packet is taken to be in the kernel's device. */
	IN_DEVICE_TICKS = 2,
	/* Distinct prefix lengths of subnets that one cluster may have at a time. */
	SUBNET_LENGTHS_MAX = 4,
	UPLINKS_MAX = 256,
	EXCLUDED_MAX = 1024,
	/* Unless the control plane asks for another size. */
	CONNECTIONS_MAX = 262144,
	/* Ports that a new connection may try; how far a look-up may have to go. */
	CANDIDATES_MAX = 128,
	/* Of these, those that are asked for a free port before one that has ended is taken. */
	CANDIDATES_NEAR = 8,
	/* A power of two. */
	PROBES_MAX = 262144,
	/* Ways that a processor remembers, a power of two; and for how many nanoseconds. */
	WAYS_MAX = 1024,
	WAY_NS = 10000000,
	/* Connections that one step of the sweep looks at. */
	SWEEP_STEP = 256,
	/* Connections that one run of `restore` takes, and bytes before the first. */
	RESTORE_STEP = 32,
	RESTORE_START = 16,
	/* Nanoseconds between steps within a round. */
	SWEEP_PAUSE_NS = 10000000,
	/* Packets of which fragments are on their way, and fragments that wait for the first one. */
	FRAGMENTS_MAX = 4096,
	HELD_MAX = 512,
	/* Of one packet: the largest in pieces of Ethernet's usual size. */
	HELD_FRAGMENTS = 48,
	/* A held fragment is smaller, in bytes; a power of two. */
	HELD_BYTES = 2048,
	/* Bytes of the ring of events, and of a packet in one of them. */
	EVENTS_BYTES = 1048576,
	EVENT_BYTES = 256,
	/* Events that one processor reports in a second, and at once after it was quiet for that long. */
	EVENTS_PER_SECOND = 1000,
	EVENTS_AT_ONCE = 500,
	/* fwmark of what kube-proxy masquerades itself. */
	KUBE_MASQUERADE_MARK = 0x4000,
	/* Outer IPv4, UDP, VXLAN and inner Ethernet header, in bytes. */
	VXLAN_OVERHEAD4 = 50,
};

/* Where a program is attached; also its name. The enum and the rows of the counters come from this list. */
#define HOOKS(X)                      \
	X(FROM_POD, from_pod)         \
	X(TO_POD, to_pod)             \
	X(TO_OVERLAY, to_overlay)     \
	X(FROM_OVERLAY, from_overlay) \
	X(FROM_NET, from_net)         \
	X(TO_NET, to_net)

enum hook {
#define X(name, field) HOOK_##name,
	HOOKS(X) HOOK_COUNT,
#undef X
};

/*
 * What became of a packet, in three groups: the fast lane took it, it was passed on to the stack (and why),
 * it was dropped (and why). Both the enum and the counters below come from this list.
 */
#define VERDICTS(X)                                                                         \
	/* not a packet of the cluster network, or one that only the bridge switches */     \
	X(UNRELATED, unrelated)                                                             \
	/* encapsulated and sent to the peer */                                             \
	X(ENCAPSULATED, encapsulated)                                                       \
	/* sent to the peer over the network they share */                                  \
	X(ROUTED, routed)                                                                   \
	/* handed to a pod of this node */                                                  \
	X(DELIVERED, delivered)                                                             \
	/* taken out of the tunnel and handed to a pod of this node */                      \
	X(DECAPSULATED, decapsulated)                                                       \
	/* handed to the kernel's tunnel device, past the rest of the stack */              \
	X(DEVICE, device)                                                                   \
	/* a tunnel packet in order, left to the kernel's tunnel device */                  \
	X(STACK_TUNNEL, stack_tunnel)                                                       \
	/* given this node's address, or the pod's back, and left to the stack */           \
	X(MASQUERADED, masqueraded)                                                         \
	/* given this node's address and sent, past the stack */                            \
	X(REPEATED, repeated)                                                               \
	/* a pod's answer to a flow let in from outside the network, sent past the stack */ \
	X(ANSWERED, answered)                                                               \
	/* a fragment that waits for the first one of its packet */                         \
	X(HELD, held)                                                                       \
	/* a first fragment, sent in once more together with those that waited for it */    \
	X(RELEASED, released)                                                               \
	/* taken out of the tunnel, and left to the stack behind the tunnel's device */     \
	X(OPENED, opened)                                                                   \
	/* for the node itself, or for or from a pod that is not known there */             \
	X(STACK_LOCAL, stack_local)                                                         \
	/* no peer has a subnet with this address */                                        \
	X(STACK_NO_PEER, stack_no_peer)                                                     \
	/* the stack translates this flow */                                                \
	X(STACK_FLOW, stack_flow)                                                           \
	/* the fast path is switched off */                                                 \
	X(STACK_OFF, stack_off)                                                             \
	/* IP options, which only the stack knows */                                        \
	X(STACK_OPTIONS, stack_options)                                                     \
	/* the hop limit ends here; the stack answers with ICMP */                          \
	X(STACK_TTL, stack_ttl)                                                             \
	/* larger than the next link takes; the stack answers with ICMP or fragments */     \
	X(STACK_TOO_BIG, stack_too_big)                                                     \
	/* a header that does not add up */                                                 \
	X(STACK_MALFORMED, stack_malformed)                                                 \
	/* a tunnel packet whose outer source is no peer */                                 \
	X(DROP_UNKNOWN_PEER, drop_unknown_peer)                                             \
	/* a tunnel packet whose inner source is not that peer's */                         \
	X(DROP_FORGED, drop_forged)                                                         \
	/* a tunnel packet cut short */                                                     \
	X(DROP_MALFORMED, drop_malformed)                                                   \
	/* a tunnel packet in pieces, which no kernel device puts together */               \
	X(DROP_FRAGMENT, drop_fragment)                                                     \
	/* the hop limit ends in a tunnel that counts as a hop */                           \
	X(DROP_TTL, drop_ttl)                                                               \
	/* for a peer that only a kernel device could send to, and there is none */         \
	X(DROP_UNREACHABLE, drop_unreachable)                                               \
	/* marked "congestion experienced" outside, not capable of it inside (RFC 6040) */  \
	X(DROP_ECN, drop_ecn)                                                               \
	/* a pod that speaks to the tunnel port of a node */                                \
	X(DROP_POD_TUNNEL, drop_pod_tunnel)                                                 \
	/* a new flow to the outside, and the table of connections is full */               \
	X(DROP_MASQ_FULL, drop_masq_full)                                                   \
	/* a new flow to the outside, and no port is left towards its remote */             \
	X(DROP_MASQ_PORTS, drop_masq_ports)                                                 \
	/* the kernel refused a change half-way */                                          \
	X(DROP_FAILED, drop_failed)

enum verdict {
#define X(name, field) VERDICT_##name,
	VERDICTS(X) VERDICT_COUNT,
#undef X
};

struct count {
	__u64 packets;
	__u64 bytes;
};

/* Value of `traffic4`, by the peer's address: what went to it and came from it, on one processor. */
struct traffic {
	struct count sent;
	struct count received;
};

struct verdict_counts {
#define X(name, field) struct count field;
	VERDICTS(X)
#undef X
};

/* The only value of `counters`: what became of the packets at each hook, on one processor. */
struct hook_counts {
#define X(name, field) struct verdict_counts field;
	HOOKS(X)
#undef X
};

/*
 * What the programs tell whoever watches: a packet that was dropped, or one by which a flow was first noted as the
 * stack's (VERDICT_STACK_FLOW).
 */
struct event {
	__u64 time_ns; /* since boot */
	__u32 ifindex;
	enum hook hook;
	enum verdict verdict;
	__u32 length;   /* of the packet, from its Ethernet header on */
	__u32 captured; /* how much of it is below */
	__u8 pad[4];
	__u8 bytes[EVENT_BYTES]; /* as the hook had it when it decided */
};

/* The only value of `watch`: somebody reads `events`. */
struct watch {
	__u64 until_ns; /* since boot; the reader renews it, and the switch goes out by itself. 0 is off */
};

/* The only value of `event_budget`, on one processor. */
struct budget {
	__u64 filled_ns; /* since boot; the tokens of the time until then have been given */
	__u64 tick;      /* of the kernel's clock, when that was */
	__u32 tokens;    /* events that may be reported yet */
	__u8 pad[4];
	__u64 suppressed; /* that were not, for want of a token */
	__u64 lost;       /* that found no room in the ring */
};

/* How much the fast path may do. */
enum fast_path {
	FAST_PATH_OFF = 0,    /* pods' packets go through the stack, both ways */
	FAST_PATH_AUTO = 1,   /* all but the flows that the stack translates */
	FAST_PATH_ALWAYS = 2, /* all; nothing on this node translates pods' flows */
	FAST_PATH_STACK = 3,  /* as OFF for now: flows that the stack translates are noted, as in AUTO */
};

/* What the tunnel between nodes puts around a packet. */
enum tunnel {
	TUNNEL_NONE = 0,
	TUNNEL_VXLAN = 1, /* IPv4, UDP, VXLAN, Ethernet; the kernel's device is complete beneath */
	TUNNEL_IPIP = 2,  /* IPv4; opened and closed by the programs alone, as is the next */
	TUNNEL_UDP = 3,   /* IPv4, UDP */
};

/* How a peer's pods are reached. */
enum reach {
	REACH_TUNNEL = 0, /* encapsulate here */
	REACH_DIRECT = 1, /* send to the peer itself, which is on a network we share */
	REACH_DEVICE = 2, /* leave it to the kernel's tunnel device */
};

/* Key of `subnets4`. */
struct subnet4 {
	__u8 address[4];
	__u32 prefix_length;
};

/* Value of `subnets4`: the peer that holds the subnet. */
struct peer4 {
	__u8 public_ip[4];
	__u8 next_hop[4]; /* neighbour on the way to public_ip */
	__u32 ifindex;    /* interface on the way to public_ip */
	enum reach reach;
	__u32 mtu; /* bytes of the largest IP packet for the peer's pods */
	__u8 vtep_mac[6];
	__u8 pad[2];
};

/* Key of `peers4`: an outer source address; the value is one of the subnets it holds. */
struct address4 {
	__u8 address[4];
};

/* How a packet is handed to a pod. */
enum delivery {
	DELIVERY_PEER = 0,   /* into the pod's namespace, past the host end of its veth */
	DELIVERY_EGRESS = 1, /* out of the host's interface */
};

/* Value of `endpoints4`, by the pod's address. */
struct endpoint4 {
	__u32 ifindex; /* host's interface behind which the pod is */
	enum delivery delivery;
	__u8 mac[6];         /* the pod's */
	__u8 gateway_mac[6]; /* what the pod's packets for elsewhere are addressed to */
	__u32 mtu;           /* bytes, of the smallest link on the way */
};

/* Value of `interfaces`, by ifindex: an interface behind which pods are. */
struct interface {
	__u8 gateway_mac[6];
	__u8 bridge; /* the ports have been passed already */
	__u8 pad;
};

/* Key of `flows4`. The numerically lower address is `a`, so that both directions are one flow. Fragments and
 * protocols without ports have ports of 0; an ICMP echo has its identifier in both. */
struct flow4 {
	__u8 a[4];
	__u8 b[4];
	__be16 port_a;
	__be16 port_b;
	__u8 protocol;
	__u8 pad[3];
};

/* Value of `flows4`: a flow that stays on the stack, in both directions. */
struct flow {
	__u64 since_ns; /* since boot */
};

/* Value of `inbound4`, by flow4: a flow from outside the network that was let in past the stack. */
struct inbound {
	__u64 since_ns; /* since boot */
	__u32 ifindex;  /* by which it came in */
	__u8 pad[4];
};

/* Key of `uplinks4` is an ifindex: an interface by which pods reach the outside, or the tunnel device. */
struct uplink4 {
	__u8 address[4]; /* of ours, for new connections */
	__u8 former[4];  /* the one before it, while it is there; or 0.0.0.0 */
};

/* Value of `in_device4`, by the outer source port: flows of which packets may be in the kernel's tunnel device. */
struct in_device {
	__u32 tick; /* of the kernel's clock, when one was left to it last */
};

/* Key of `excluded4`, a trie: destinations to which pods keep their address. */
struct excluded4 {
	__u32 prefix_length;
	__u8 address[4];
};

enum connection_state {
	CONNECTION_NEW = 0,
	CONNECTION_ESTABLISHED = 1, /* both sides have spoken */
	CONNECTION_CLOSING = 2,     /* one side has ended it */
	CONNECTION_CLOSED = 3,      /* both have, or one has reset it */
	CONNECTION_GONE = 4,        /* about to be removed */
};

/* Key of `connections4`: a masqueraded flow as the outside sees it. An ICMP echo has its identifier as `port`. */
struct connection_key4 {
	__u8 address[4]; /* ours */
	__u8 remote[4];
	__be16 port;
	__be16 remote_port;
	__u8 protocol;
	__u8 pad[3];
};

/* `bucket` of a connection that nobody looks up by its pod. */
#define NO_BUCKET (~0U)

/* Value of `connections4`. */
struct connection4 {
	struct bpf_spin_lock lock; /* held while a connection that has ended becomes another */
	enum connection_state state;
	__u8 pod[4];
	__be16 pod_port;
	__u8 replied;    /* the remote has answered */
	__u8 pod_fin;    /* the pod has ended its side */
	__u8 remote_fin; /* the remote has */
	__u8 on_stack;   /* the stack translates it as well, or must see it: not for the fast lane */
	__u8 pad[2];
	__u32 ifindex; /* uplink by which it left */
	__u32 bucket;  /* of `probes4` */
	/* Of a TCP pod's FIN, for who gets its name next: the sequence number behind it, and its time by the option, or 0. */
	__u32 end_sequence;
	__u32 end_time;
	__u8 pad2[4];
	__u64 seen_ns;  /* since boot; a second old at most while packets flow */
	__u64 since_ns; /* since boot */
};

/* What `restore` reads, RESTORE_STEP of it: a row of a former `connections4`. */
struct saved4 {
	struct connection_key4 key;
	struct connection4 connection;
};

/* Value of `probes4`, by hash of flows as pods see them: where their rows can be. */
struct probe {
	struct bpf_spin_lock lock;
	__u16 furthest; /* along a flow's candidate ports */
	__u16 rows;     /* connections of this bucket */
};

/*
 * Value of `ways4`, by a hash of flows, on one processor: where a masqueraded flow went a moment ago, and under which
 * name. Whether its connection is still that is asked for each packet.
 */
struct way4 {
	__u8 pod[4];
	__u8 remote[4];
	__be16 pod_port;
	__be16 remote_port;
	__u8 protocol;
	__u8 tos;        /* of which routes know */
	__be16 port;     /* outside */
	__u8 address[4]; /* ours */
	__u8 next_hop[4];
	__u32 pod_ifindex;
	__u32 ifindex; /* uplink */
	__u32 mtu;     /* bytes of the largest IP packet */
	__u8 pad[4];
	__u64 at_ns; /* since boot: when the kernel was asked; 0 in an empty row */
};

/* Entry of the queue `expiring4`: a connection to look at. */
struct expiring4 {
	struct connection_key4 key;
	__u32 round;
};

/* How room for connections is. */
enum pressed {
	PRESSED_NOT = 0,
	PRESSED_HALF = 1, /* half of it was in use when it was last counted */
	PRESSED_FULL = 2, /* a new flow found none */
};

/* The only value of `expiry`: the sweep of connections, which goes on by itself. */
struct expiry {
	struct bpf_timer timer;
	__u32 round;
	enum pressed pressed;
};

/* Connections of one protocol, by state; in the order of `enum connection_state`. */
struct state_counts {
	__u32 opening;
	__u32 established;
	__u32 closing;
	__u32 closed;
};

/* The two values of `census4`: what the sweep has counted in its last round, and in the one under way. */
enum census_row {
	CENSUS_LAST = 0,
	CENSUS_NEXT = 1,
	CENSUS_ROWS = 2,
};

struct census4 {
	struct state_counts tcp;
	struct state_counts udp;
	struct state_counts icmp;
	struct state_counts other;
	__u32 furthest; /* along their candidate ports that connections had to go, of CANDIDATES_MAX */
	__u8 pad[4];
	__u64 at_ns; /* end of the round, since boot; 0 before the first */
};

/* Key of `fragments4`: which packet a fragment is of. */
struct fragment4 {
	__u8 source[4];
	__u8 destination[4];
	__be16 id;
	__u8 protocol;
	__u8 pad;
};

/* Value of `fragments4`: what its first fragment has said. */
struct datagram4 {
	__u8 address
		[4]; /* of the pod in place of ours, or ours in place of the pod's; 0.0.0.0 to change nothing */
	__u8 pad[4];
	__u64 since_ns; /* since boot */
};

/* Key of `held4`. */
struct held_key4 {
	struct fragment4 fragment;
	__u32 index;
};

/* Value of `held4`: a fragment that came before the first one. */
struct held4 {
	__u64 since_ns; /* since boot */
	__u32 length;   /* of the IP packet */
	__u8 pad[4];
	__u8 bytes[HELD_BYTES];
};

/* Seconds that a connection lives without a packet, by protocol and state. */
struct timeouts {
	__u32 tcp_new;
	__u32 tcp_established;
	__u32 tcp_closing;
	__u32 tcp_closed;    /* by a reset; or however, if room is scarce */
	__u32 tcp_time_wait; /* by both sides */
	__u32 udp_new;
	__u32 udp_established;
	__u32 icmp;
	__u32 other;
};

/* Facts fixed when the programs are loaded. The verifier removes what they switch off. */
struct config {
	__be32 network4; /* all pods of the cluster */
	__be32 network4_mask;
	__be32 subnet4; /* the pods of this node */
	__be32 subnet4_mask;
	__be32 vtep4;          /* our outer source address, and the one that peers send to */
	__u32 overlay_ifindex; /* flannel.<VNI>, or what stands for it; 0 without a tunnel */
	__u32 vni;
	__be16 tunnel_port;
	__u16 source_port_min; /* of the outer UDP header */
	__u16 source_port_max;
	__u8 vtep_mac[6];
	__u32 subnet_lengths[SUBNET_LENGTHS_MAX]; /* longest first; 0 ends the list */
	enum fast_path fast_path;
	enum tunnel tunnel; /* by which peers may be reached */
	__u8 ttl;           /* of the outer IP header */
	__u8 encapsulate;   /* in these programs rather than by the kernel's device */
	__u8 decapsulate;
	__u8 direct; /* what travels without a tunnel is taken from peers, and sent to them */
	__u8 masquerade;
	__u8 let_in;      /* what comes from outside the network to a pod goes there past the stack */
	__u8 count_peers; /* in `traffic4` */
	__u8 pad;
	__u16 masq_port_min;
	__u16 masq_port_max;
	__u32 masq_seed;        /* of the hash by which ports are chosen; stays while connections live */
	__u32 masq_connections; /* that there can be */
	struct timeouts timeouts;
};

#endif
