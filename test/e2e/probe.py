#!/usr/bin/python3
"""Traffic that ping and curl cannot make, sent and judged at the level of sockets and frames.

serve TCP UDP             answers on two ports until it is ended; says `ready`
tcp ADDRESS PORT UP DOWN  sends and fetches so many bytes and compares their digests
udp ADDRESS PORT SIZE     sends datagrams, waits for each one's digest from the server
error ADDRESS PORT SIZE   sends one datagram to where nothing answers and tells the ICMP error that came
pieces ADDRESS PORT SIZE  sends datagrams in pieces, each in an order that is given, and waits for each one's digest
inject DEVICE             sends the frames given on standard input, a line of hex digits each; with --step FILE
                          those in the file, one for each SIGUSR1

The last line of output is JSON. A digest that differs, or an answer that stays away, is an exit code of 1.
"""
import argparse
import hashlib
import json
import os
import selectors
import signal
import socket
import struct
import sys

UDP_SEGMENT = 103
IP_MTU_DISCOVER, IP_RECVERR = 10, 11
PMTU = {"dont": 0, "want": 1, "do": 2}
PATIENCE = 10.0


def pattern(size, seed=0):
    """`size` bytes in which every lost, doubled or swapped piece shows."""
    block = b"".join(struct.pack(">I", (seed * 7919 + i) & 0xFFFFFFFF) for i in range(16384))
    return (block * (size // len(block) + 1))[:size]


def digest(data):
    return hashlib.sha256(data).hexdigest()


def receive(connection, size):
    parts = []
    while size > 0:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionError(f"the connection ended {size} bytes early")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve(arguments):
    tcp = socket.create_server((arguments.address, arguments.tcp), backlog=64)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    udp.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTU["dont"])
    udp.bind((arguments.address, arguments.udp))
    waiting = selectors.DefaultSelector()
    waiting.register(tcp, selectors.EVENT_READ)
    waiting.register(udp, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is tcp:
                serve_connection(tcp)
            else:
                data, source = udp.recvfrom(65535)
                print(f"udp {source[0]} {len(data)}", flush=True)
                udp.sendto(f"{digest(data)} {source[0]}".encode(), source)


def serve_connection(tcp):
    connection, source = tcp.accept()
    connection.settimeout(PATIENCE)
    print(f"tcp {source[0]}", flush=True)
    # One that breaks off is the client's to report; the server goes on.
    try:
        with connection:
            while True:
                head = connection.recv(16, socket.MSG_WAITALL)
                if len(head) < 16:
                    return
                up, down = struct.unpack(">QQ", head)
                seen = digest(receive(connection, up))
                connection.sendall(f"{seen} {source[0]:>15}".encode() + pattern(down, 1))
    except OSError as error:
        print(f"tcp {source[0]} broke off: {error}", flush=True)


def tcp(arguments):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        if arguments.source:
            client.bind((arguments.source, 0))
        if arguments.mss:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, arguments.mss)
        client.connect((arguments.address, arguments.port))
        data = pattern(arguments.up)
        for turn in range(arguments.turns):
            if arguments.pause:
                print(f"turn {turn}", flush=True)
                sys.stdin.readline()
            client.sendall(struct.pack(">QQ", arguments.up, arguments.down) + data)
            answer = receive(client, 64 + 1 + 15)
            fetched = receive(client, arguments.down)
            intact = answer[:64].decode() == digest(data) and fetched == pattern(arguments.down, 1)
            if not intact:
                return {"intact": False}
        peer = client.getpeername()[0]
    return {"intact": True, "seen": answer[65:].decode().strip(), "peer": peer}


def udp(arguments):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTU[arguments.pmtu])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        if arguments.source:
            client.bind((arguments.source, 0))
        client.connect((arguments.address, arguments.port))
        segment = arguments.segment or arguments.size
        seen = set()
        tries = 0
        for turn in range(arguments.count):
            data = pattern(arguments.size, turn)
            wanted = {digest(data[at : at + segment]) for at in range(0, len(data), segment)}
            control = []
            if arguments.segment:
                control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", arguments.segment))]
            while wanted:
                tries += 1
                if tries > 5 * arguments.count:
                    return {"intact": False, "missing": len(wanted)}
                try:
                    client.sendmsg([data], control)
                    while wanted:
                        answer, source = client.recvmsg(200)[0].decode().split()
                        wanted.discard(answer)
                        seen.add(source)
                except OSError as error:
                    # The path's MTU has become known; the next try keeps to it.
                    if not arguments.retry or "too long" not in str(error):
                        raise
        return {"intact": True, "seen": ",".join(sorted(seen)), "peer": client.getpeername()[0], "tries": tries}


def error(arguments):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTU[arguments.pmtu])
        if arguments.ttl:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, arguments.ttl)
        client.connect((arguments.address, arguments.port))
        waiting = selectors.DefaultSelector()
        # An error that is queued wakes a reader whatever it waits for.
        waiting.register(client, selectors.EVENT_READ)
        client.send(pattern(arguments.size))
        if not waiting.select(PATIENCE):
            return {"intact": False}
        _, control, _, _ = client.recvmsg(65535, 512, socket.MSG_ERRQUEUE)
        value = next(data for level, kind, data in control if (level, kind) == (socket.IPPROTO_IP, IP_RECVERR))
        number, origin, kind, code, _, info, _ = struct.unpack("=IBBBBII", value[:16])
        offender = socket.inet_ntoa(value[20:24]) if origin == 2 else "local"
        return {"intact": True, "type": kind, "code": code, "mtu": info, "from": offender}


def step(device, path):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    with open(path) as file:
        frames = [bytes.fromhex(line) for line in file]
    print("ready", flush=True)
    for number, frame in enumerate(frames):
        signal.sigwait({signal.SIGUSR1})
        device.send(frame)
        print("sent", number, flush=True)
    return {"intact": True, "sent": len(frames)}


def pieces(arguments):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, socket.socket(
        socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW
    ) as raw:
        client.settimeout(PATIENCE)
        client.connect((arguments.address, arguments.port))
        port = client.getsockname()[1]
        target = socket.inet_aton(arguments.address)
        for turn, order in enumerate(arguments.order):
            places = [int(place) for place in order.split(",")]
            data = pattern(arguments.size, turn)
            body = struct.pack(">HHHH", port, arguments.port, 8 + len(data), 0) + data
            # Every piece but the last is a multiple of 8 bytes.
            step = -(-len(body) // len(places) // 8) * 8
            for place in places:
                piece = body[place * step : (place + 1) * step]
                more = 0x2000 if (place + 1) * step < len(body) else 0
                field = more | place * step // 8
                # The kernel fills in the checksum, and our address.
                head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(piece), 1000 + turn, field, 64, 17, 0, bytes(4), target)
                raw.sendto(head + piece, (arguments.address, 0))
            if client.recv(200).decode().split()[0] != digest(data):
                return {"intact": False, "order": order}
        return {"intact": True}


def inject(arguments):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as device:
        device.bind((arguments.device, 0))
        if arguments.step:
            return step(device, arguments.step)
        frames = [bytes.fromhex(line) for line in sys.stdin]
        for frame in frames:
            device.send(frame)
        return {"intact": True, "sent": len(frames)}


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)

    def command(run, *positional):
        one = commands.add_parser(run.__name__)
        one.set_defaults(run=run)
        for name, kind in positional:
            one.add_argument(name, type=kind)
        return one

    one = command(serve, ("tcp", int), ("udp", int))
    one.add_argument("--address", default="0.0.0.0")
    one = command(tcp, ("address", str), ("port", int), ("up", int), ("down", int))
    one.add_argument("--source")
    one.add_argument("--mss", type=int)
    one.add_argument("--turns", type=int, default=1)
    one.add_argument("--pause", action="store_true")
    one = command(udp, ("address", str), ("port", int), ("size", int))
    one.add_argument("--source")
    one.add_argument("--segment", type=int)
    one.add_argument("--count", type=int, default=1)
    one.add_argument("--pmtu", choices=PMTU, default="dont")
    one.add_argument("--retry", action="store_true")
    one = command(error, ("address", str), ("port", int), ("size", int))
    one.add_argument("--ttl", type=int)
    one.add_argument("--pmtu", choices=PMTU, default="dont")
    one = command(pieces, ("address", str), ("port", int), ("size", int))
    one.add_argument("--order", action="append", required=True)
    one = command(inject, ("device", str))
    one.add_argument("--step")
    arguments = parser.parse_args()
    try:
        result = arguments.run(arguments)
    except OSError as problem:
        result = {"intact": False, "error": problem.strerror or str(problem)}
    print(json.dumps(result), flush=True)
    sys.exit(0 if result["intact"] else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(0)
