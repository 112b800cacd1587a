#!/usr/bin/env bash
# Everything that is measured on one GPU, in ten minutes at most:
#
#     benchmarks/gpu.sh [full|tiny] [RESULTS]
#
# full are networks of the published size with random weights, in bfloat16; it takes 64 GB of RAM, 30 GB of disk in
# TMPDIR, and 40 GB of GPU memory or more. tiny is a dry run of the same commands, on a CPU too. What does not fit into
# the time is left out or cut short; every benchmark writes what it has, and each case of a training step counts.
# LIMIT sets the seconds, PYTHON the interpreter.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

size=${1:-full} results=${2:-benchmarks/results} limit=${LIMIT:-570}
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
kind=$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")') || exit 1
mkdir -p "$results"
failed=0

run() {
    local left=$((limit - SECONDS))
    echo "== after $SECONDS s: $*"
    if [ "$left" -le 0 ] || ! timeout "$left" "$python" benchmarks/"$@"; then
        echo "== failed, or no time left: $*"
        failed=1
    fi
}

step() {
    run train_step.py "${model[@]}" --rounds 2 --steps "$steps" --output "$results" "$@"
}

case $size in
full)
    model=(--model-size full --mixed-precision bf16 --images 256 --folder "$folder") steps=8
    run measuring/models.py "$folder/full" --model-size full
    step --stage prior --batch-size 16 64 256
    step --stage decoder --resolution 512 --batch-size 4 16
    step --stage decoder --resolution 768 --batch-size 8
    step --stage prior --batch-size 64 --levers
    step --stage prior --batch-size 64 --lora-rank 16
    step --stage decoder --resolution 512 768 --batch-size 8 --lora-rank 16
    run build.py "${model[@]}" --batch-size 32 --rounds 2 --output "$results"
    run inpaint.py "${model[@]}" --resolution 512 --batch-size 8 --steps "$steps" --rounds 4 --output "$results"
    run small_training.py --model-size full --resolution 512 --ways "fp32, adamw-8bit" "bf16, adamw-8bit" \
        "bf16, adamw-8bit, fused backward" --output "$results"
    shapes=(--model-size full --mixed-precision bf16 --resolution 512 768 --images 48 --rounds 2 --passes 4)
    streaming=(--seconds 10)
    loader=() parity=() levers=(--resolution 512 --batch-size 8)
    ;;
tiny)
    # The commands are tried, not the compiler: on a CPU it takes minutes.
    export TORCHDYNAMO_DISABLE=1
    model=(--model-size tiny --images 8 --folder "$folder") steps=1
    run measuring/models.py "$folder/tiny"
    step --stage prior --batch-size 1 2 4
    step --stage decoder --resolution 64 --batch-size 1 2
    step --stage decoder --resolution 128 --batch-size 2
    step --stage prior --batch-size 2 --levers
    step --stage prior --batch-size 2 --lora-rank 16
    step --stage decoder --resolution 64 128 --batch-size 2 --lora-rank 16
    run build.py "${model[@]}" --batch-size 2 --rounds 1 --output "$results"
    run inpaint.py "${model[@]}" --resolution 64 --batch-size 2 --steps 1 --rounds 2 --output "$results"
    run small_training.py --steps 2 --ways "fp32, adamw-8bit" "bf16, adamw-8bit" --output "$results"
    shapes=(--resolution 64 128 --images 4 --batch-size 1 --steps 1 --rounds 1 --passes 1)
    streaming=(--samples 512 --seconds 1)
    loader=(--rows 512 --batches 4 --slow-batches 1 --rounds 1) parity=(--images 16 --steps 2)
    levers=(--resolution 64 --batch-size 2)
    ;;
*)
    echo "usage: $0 [full|tiny] [RESULTS]" >&2
    exit 2
    ;;
esac
device=$(test "$kind" = gpu && echo cuda || echo cpu)
run parity.py "${parity[@]}" --device "$device" --output "$results/parity-$kind.json"
run loader.py "${loader[@]}" --device "$device" --output "$results/loader-$kind.json"
run shapes.py "${shapes[@]}" --folder "$folder" --output "$results"
# Late, as the decoder has many blocks to compile.
step --stage decoder "${levers[@]}" --levers
# Last, as it uses no GPU, and a line of limited rate is waited for however fast the machine is.
run streaming.py "${streaming[@]}" --output "$results"
"$python" benchmarks/report.py "$results"
exit $failed
