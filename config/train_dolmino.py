# The 124 M decoder of GPT-2 with retrieval, on the mixture of the public nanoRETRO: Dolmino, streamed from the hub.
# python -m retrieval.populate config/train_dolmino.py      # reads all of it once: begin with a smaller mixture
# torchrun --standalone --nproc_per_node=8 train.py config/train_dolmino.py
# It has not been run here: no machine of ours reaches the hub.
from data.documents import DatasetConfig

_SHARES = dict(dclm=47.2, flan=16.6, pes2o=5.85, wiki=7.11, stackexchange=2.45)  # of the tokens; its math is left out


def part(name, **options):
    """The source tells documents apart that two parts number alike."""
    return DatasetConfig('allenai/dolmino-mix-1124', name, source=name, skip_bad=True, streaming=True, **options)


out_dir = 'out/dolmino'
train_datasets = [part(name, weight=share, val_fraction=0.01) for name, share in _SHARES.items()]
val_datasets = [part(name, val_fraction=0.01) for name in _SHARES]
eval_tokens = 200_000  # of each part eval_tokens / val_fraction are read for them before the first step
stream_workers = 2
eval_interval = 1000

max_iters = 100_000  # of 491,520 tokens

retrieval_milvus_uri = 'http://localhost:19530'
retrieval_collection = 'dolmino'
