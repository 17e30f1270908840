#!/bin/sh
# Trains the checkpoints of this folder again: sh models/tiny/train.sh RUNS
# Each command goes on where it stopped if it is interrupted and started again.
set -eu
runs=${1:?usage: train.sh RUNS, a folder for the runs}

# 1, 2: four frames a video. What a photograph looks like is learnt at a quarter of the tokens.
vmonarch train --config tiny --frames 4 --optimizer muon --batch-size 8 --steps 400 \
    --warmup-steps 20 --learning-rate 3e-3 --shift 3 --save-every 50 --out "$runs/stage1"
vmonarch finetune --from "$runs/stage1/export" --attention dense --frames 4 \
    --optimizer muon --batch-size 8 --steps 400 --warmup-steps 10 --learning-rate 3e-3 \
    --shift 3 --seed 1 --save-every 100 --out "$runs/stage2"
# 3: all sixteen frames.
vmonarch finetune --from "$runs/stage2/export" --attention dense --frames 16 \
    --optimizer muon --batch-size 4 --steps 300 --warmup-steps 10 --learning-rate 2e-3 \
    --shift 3 --seed 2 --save-every 50 --out "$runs/dense"
# 4: the same weights under VMonarch.
vmonarch finetune --from "$runs/dense/export" --attention vmonarch \
    --optimizer muon --batch-size 4 --steps 220 --warmup-steps 10 --learning-rate 5e-4 \
    --shift 3 --seed 3 --save-every 55 --out "$runs/vmonarch"
# 5: the same weights under SALAD: linear branches and adapters are all that is trained.
salad="--sparse top_k --sparsity 0.9 --block-size 16 --tile 1x4x4"
vmonarch finetune --from "$runs/dense/export" --attention salad $salad --rank 16 \
    --optimizer muon --batch-size 4 --steps 220 --warmup-steps 10 --learning-rate 3e-3 \
    --shift 3 --seed 3 --save-every 20 --out "$runs/salad"

python - "$runs" <<'PYTHON'
import pathlib
import sys

from vmonarch_jax.models import export_params, load_params
from vmonarch_jax.models.metrics import plot_losses

runs = pathlib.Path(sys.argv[1])
names = ("stage1", "stage2", "dense", "vmonarch", "salad")
plot_losses({name: runs / name / "metrics.csv" for name in names}, runs / "loss.png")
# What SALAD's tuning changed, beside the model that it was tuned from.
config, params = load_params(runs / "salad" / "export")
export_params(runs / "salad" / "beside_dense", config, params, base=runs / "dense" / "export")
PYTHON
for method in dense vmonarch salad; do
    options=
    test "$method" != salad || options=$salad
    vmonarch sample --model "$runs/$method/export" --attention "$method" $options --seed 0 \
        --video pan_left:coffee --video pan_up:astronaut --video zoom_in:chelsea \
        --video rotate_cw:rocket --video sprite:motorcycle --video zoom_out:retina \
        --out "$runs/samples_$method"
done
