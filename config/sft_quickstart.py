# Tunes the quickstart's model to answer what functions do (docs/tuning.md): two CPU cores, two minutes.
# python data/docstrings/prepare.py && python sft.py config/sft_quickstart.py
from data.documents import DatasetConfig

out_dir = 'out/sft_quickstart'
init_from = 'out/quickstart'
eval_interval = 60
eval_tokens = 0
log_interval = 10

train_datasets = [DatasetConfig('data/docstrings/train.jsonl')]
val_datasets = [DatasetConfig('data/docstrings/val.jsonl')]
template = '{system}\n\nQuestion: {user}\n\nAnswer: """{assistant}"""'  # as docstrings begin: pointers find them
gradient_accumulation_steps = 1
batch_size = 8

learning_rate = 2e-3
max_iters = 120
warmup_iters = 20
compile = False  # needs a C++ compiler
