# InstructRetro's instruction tuning (Wang et al. 2023, arXiv 2310.07713) of a RETRO of your own, with the open blend
# that Megatron-LM published beside it: 1,000 steps of 128 at a constant learning rate of 5e-6, on the decoder alone.
#     python data/instructretro/prepare.py && python sft.py config/sft_instructretro.py --init_from=out/retro_857m
# What differs: the sets, as data/instructretro/prepare.py says; conversations are packed, so a step of 128 sequences
# has more than 128 of them; and the private sets that the paper's own models were tuned on, too, are not to be had,
# which by Megatron-LM's account changes accuracy by one or two points.
from data.documents import DatasetConfig

out_dir = 'out/sft_instructretro'
init_from = 'out/retro_857m'
eval_interval = 200
eval_tokens = 200_000

_shares = dict(  # of the samples, as published
    soda=0.020, eli5=0.012, askscience=0.005, askhistorians=0.003, self_instruct_short=0.010, self_instruct_long=0.020,
    unnatural_instructions=0.020, flan_cot=0.010, dolly=0.050, oasst=0.817, oasst_code=0.033)
train_datasets = [DatasetConfig(f'data/instructretro/{_name}.jsonl', weight=_share, val_fraction=0.01)
                  for _name, _share in _shares.items()]
val_datasets = train_datasets  # the 1 % of each that is held out
template = 'instructretro'
freeze_retrieval = True

batch_size = 4
gradient_accumulation_steps = 32
learning_rate = 5e-6
decay_lr = False
warmup_iters = 0
beta2 = 0.98
weight_decay = 1e-2
max_iters = 1000
