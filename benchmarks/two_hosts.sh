#!/usr/bin/env bash
# Train on two "hosts" of this machine: network namespaces with an address each, joined by a pair of virtual links.
#
#     sudo benchmarks/two_hosts.sh [PYTHON]
#
# Needs the right to make network namespaces (root, or CAP_NET_ADMIN and CAP_SYS_ADMIN).
set -euo pipefail
python=${1:-python}
work=$(mktemp -d)
cleanup() {
    ip netns del multivi-a 2>/dev/null || true
    ip netns del multivi-b 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
ip netns add multivi-a
ip netns add multivi-b
ip link add multivi0 netns multivi-a type veth peer name multivi1 netns multivi-b
ip -n multivi-a addr add 10.77.0.1/24 dev multivi0
ip -n multivi-b addr add 10.77.0.2/24 dev multivi1
for side in a b; do
    ip -n multivi-$side link set lo up
    ip -n multivi-$side link set multivi$([ $side = a ] && echo 0 || echo 1) up
done
"$python" - "$work/cells.h5ad" <<'PYTHON'
import sys
import pyro_multivi as pm
pm.simulate_multiome((120, 60, 60), n_genes=100, n_regions=300, seed=0).write_h5ad(sys.argv[1])
PYTHON
launch() {
    local interface=multivi$([ "$1" = a ] && echo 0 || echo 1)
    ip netns exec "multivi-$1" env GLOO_SOCKET_IFNAME="$interface" OMP_NUM_THREADS=1 "$python" -m torch.distributed.run \
        --nnodes 2 --nproc-per-node 1 --node-rank "$2" --master-addr 10.77.0.1 --master-port 29500 \
        -m pyro_multivi train "$work/cells.h5ad" --modality-key modality --out "$work/result" --max-epochs 3 --quiet
}
launch b 1 >"$work/b.log" 2>&1 &
second=$!
launch a 0
if ! wait $second; then
    cat "$work/b.log"
    exit 1
fi
ls "$work/result"
echo "two hosts trained one model"
