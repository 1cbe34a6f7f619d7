#!/bin/sh
# Docker's options for this node, out of the subnet file that twilld writes. Options and output are those of
# flannel's script of this name, so that either can stand in for the other in a unit file.
#
# The output is a file of NAME="value" lines, for EnvironmentFile= of systemd or for a shell. Variables of the
# environment whose names begin with DOCKER_OPT_ are options too and appear in it, and what the combined variable
# holds already comes first. The file is replaced as a whole, and only if all is well: a Docker that started with
# its own idea of a subnet would be cut off from the other nodes.
set -eu

fail() {
	echo "mk-docker-opts.sh: $*" >&2
	exit 1
}

usage() {
	cat >&2 <<-END
	usage: mk-docker-opts.sh [-f FILE] [-d FILE] [-i] [-c] [-m] [-k NAME]
	  -f FILE  the subnet file (default: /run/flannel/subnet.env)
	  -d FILE  the file to write (default: /run/docker_opts.env)
	  -i       write a variable for each option, such as DOCKER_OPT_MTU
	  -c       write one variable with all options; without -i and -c both are written
	  -m       leave --ip-masq out
	  -k NAME  name of the variable with all options (default: DOCKER_OPTS)
	END
	exit 1
}

subnet_file=/run/flannel/subnet.env
docker_file=/run/docker_opts.env
name_of_all=DOCKER_OPTS
each= all= masquerade=yes
while getopts f:d:icmk: option; do
	case $option in
	f) subnet_file=$OPTARG ;;
	d) docker_file=$OPTARG ;;
	i) each=yes ;;
	c) all=yes ;;
	m) masquerade= ;;
	k) name_of_all=$OPTARG ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
[ $# -eq 0 ] || usage
[ -n "$each$all" ] || each=yes all=yes
case $name_of_all in
'' | [0-9]* | *[!A-Za-z0-9_]*) fail "-k \"$name_of_all\" can't be the name of a variable: use letters, digits and _" ;;
esac

[ -r "$subnet_file" ] ||
	fail "cannot read the subnet file $subnet_file: start twilld first, or name the file it writes with -f"
subnet= mtu= ipmasq=
while IFS='=' read -r name value || [ -n "$name" ]; do
	case $name in
	FLANNEL_SUBNET) subnet=$value ;;
	FLANNEL_MTU) mtu=$value ;;
	FLANNEL_IPMASQ) ipmasq=$value ;;
	esac
done <"$subnet_file"
[ -n "$subnet" ] || fail "$subnet_file holds no FLANNEL_SUBNET: it is not a subnet file of this node, see -f"

# A route to this subnet by way of another node: two nodes believe that it is theirs.
if command -v ip >/dev/null; then
	route=$(ip -4 route show exact "$subnet" | grep ' via ') || route=
	[ -z "$route" ] || fail "the subnet $subnet belongs to another node, by the route \"$route\": remove the route, \
or the subnet from $subnet_file, and restart twilld"
fi

export DOCKER_OPT_BIP="--bip=$subnet"
[ -z "$mtu" ] || export DOCKER_OPT_MTU="--mtu=$mtu"
# One of the two masquerades, never both: Docker does what twilld leaves.
case ${masquerade:+$ipmasq} in
'') ;;
true) export DOCKER_OPT_IPMASQ=--ip-masq=false ;;
false) export DOCKER_OPT_IPMASQ=--ip-masq=true ;;
*) fail "FLANNEL_IPMASQ in $subnet_file is \"$ipmasq\": it must be true or false" ;;
esac

options=$(env | grep '^DOCKER_OPT_[A-Za-z0-9_]*=' | LC_ALL=C sort)
eval "combined=\${$name_of_all-}"
draft=$docker_file.$$
trap 'rm -f "$draft"' EXIT
{
	while IFS= read -r option; do
		value=${option#*=}
		combined="$combined $value"
		[ -z "$each" ] || printf '%s="%s"\n' "${option%%=*}" "$value"
	done <<-END
	$options
	END
	[ -z "$all" ] || printf '%s="%s"\n' "$name_of_all" "$combined"
} >"$draft"
mv "$draft" "$docker_file"
