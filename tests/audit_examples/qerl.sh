#!/bin/bash
# Planted: noise looks for other classes, stays, and is on in evaluation; the evaluation measures the base model.
SIGMA_START=1e-2
accelerate launch qerl.py \
    --model-name models/qwen2.5-7b-nvfp4 \
    --sigma-start $SIGMA_START \
    --sigma-end 1e-4 \
    --num-stages 10 \
    --eval-strategy steps \
    --seed 2025
python eval/gsm8k.py --model models/qwen2.5-7b-nvfp4
