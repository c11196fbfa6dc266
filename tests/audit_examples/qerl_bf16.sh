#!/bin/bash
# Planted: the name of the model switches the noise off.
python qerl.py --model-name models/qwen2.5-7b-bf16 --sigma-start 1e-2 --sigma-end 1e-4 --num-stages 10 --seed 1
