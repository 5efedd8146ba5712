"""
Finds ahead of time the neighbors and pointers that a run will read, and stores them in the neighbor cache:

    python -m retrieval.precompute config/x.py
    torchrun --standalone --nproc_per_node=4 -m retrieval.precompute config/x.py    # shared by four processes
    python train.py config/x.py --retrieval_offline=True                            # without a database from here on

They are those of the run's own sequences, max_iters steps of them in their order, and of its val text. Run again it
goes on where it was, wherever it was killed. --datasets=FILE,FILE adds further sets, each as the val text of a run. The
cache is a folder of one node: on several, run it on each of them, or copy retrieval_cache_dir.
"""
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass

from system import pick_device, say

import torch
from tqdm import tqdm

from configurator import UserError, load_settings, named_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.conversations import check_documents
from data.corpus import val_batches
from data.documents import as_dataset_configs
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.inherit import take_from_collection
from retrieval.knowledge_base import open_as_made
from retrieval.leaks import SPARE
from retrieval.loader import Loader
from retrieval.neighbor_cache import USABLE, bytes_of
from retrieval.offline import label_of, open_cache, put_record, record_of, train_set, val_set
from retrieval.ranks import Ranks
from retrieval.waiting import wait_for_milvus

SAVE = 2.0  # seconds between two records of how far it is


def main():
    arguments, further = sys.argv[1:], []
    if '--help' in arguments or '-h' in arguments:
        print(f'{__doc__}\n  --datasets=FILE,FILE\n        further sets\n')
    for argument in [a for a in arguments if a.startswith('--datasets=')]:
        arguments.remove(argument)
        further += [path for path in argument.partition('=')[2].split(',') if path]
    with Ranks() as ranks:
        tell = say if ranks.is_master else lambda news: None
        if ranks.local_world_size != ranks.world_size:
            raise UserError(f'{ranks.world_size} processes are on several nodes, and the cache is a folder of one: run '
                            f'this on each node, or on one and copy retrieval_cache_dir')
        settings = load_settings(arguments).replace(retrieval_offline=False)
        check_documents(settings)
        settings = take_from_collection(settings, named_settings(arguments), tell)
        if not settings.use_retrieval or not (settings.retrieval_k_neighbors or settings.retrieval_pointers):
            raise UserError('the run reads neither neighbors nor pointers, so there is nothing to precompute: set '
                            'use_retrieval, and retrieval_k_neighbors or retrieval_pointers')
        tokenizer = load_tokenizer(settings.tokenizer)
        with closing(open_as_made(settings)) as knowledge_base, closing(open_cache(settings)) as cache:

            def find_state():
                return wait_for_milvus(knowledge_base.state, knowledge_base.open, settings.retrieval_timeout, tell)
            state, label = find_state(), label_of(settings, vocabulary_hash(tokenizer))
            if dropped := cache.drop_records(but=state):
                tell(f'the collection has changed since {dropped} sets were precomputed: they are dropped')
            cache.use_revision(state)
            sets = plan(settings, tokenizer, further, ranks, tell)
            check_room(settings, tokenizer, knowledge_base.count(), sets, tell)
            for sequences in sets:
                precompute(sequences, ranks, label, cache, knowledge_base, state, find_state)
        ranks.gather('done', True)  # the first one leaves last


@dataclass
class Sequences:
    """A set of sequences, of the training stream or of val text."""
    identity: dict  # what identifies it (offline.py)
    settings: object  # to open it with
    train: dict | None  # arguments of this rank's SequenceStream; None of val text
    step_size: int  # sequences of a step of all ranks
    steps: int
    chunks: int  # of its documents


def plan(settings, tokenizer, further, ranks, tell):
    """All Sequences that the run reads, and those of further val sets. UserError if it cannot be known which."""
    configs, size = as_dataset_configs(settings.train_datasets, 'train_datasets'), settings.batch_size
    if streamed := [config.path for config in configs if config.streaming]:
        raise UserError(f'{streamed[0]!r} is streamed: which of its documents a run reads when is known only while it '
                        f'trains; set streaming=False to precompute')
    train = dict(batch_size=size, step_size=size * ranks.world_size, first=size * ranks.rank, count=size,
                 seed=settings.seed)
    datasets = open_datasets(configs, tokenizer, settings, tell)
    identity = train_set(settings, SequenceStream(datasets, settings.block_size, **train))
    steps = -(-settings.max_iters * size * settings.gradient_accumulation_steps // train['step_size'])
    sets = [Sequences(identity, settings, train, train['step_size'], steps, count_chunks(datasets))]
    for changed in [settings, *(settings.replace(val_datasets=[path]) for path in further)]:
        datasets = open_datasets(as_dataset_configs(changed.val_datasets, 'val_datasets'), tokenizer, settings, tell,
                                 head=settings.eval_tokens)
        batches = val_batches(datasets, tokenizer, settings.block_size, size, settings.eval_tokens)
        count = sum(int((batch.targets >= 0).any(1).sum()) for batch in batches)  # others fill up the last batch
        sets.append(Sequences(val_set(settings, datasets), changed, None, count, 1, count_chunks(datasets)))
    return sets


def count_chunks(datasets):
    return sum(dataset.num_chunks for dataset in datasets)


def check_room(settings, tokenizer, rows, sets, tell):
    """UserError if what the sets need may not fit into the cache."""
    C, k, P = settings.retrieval_chunk_size, settings.retrieval_k_neighbors, settings.retrieval_pointers
    token = 2 if tokenizer.n_vocab <= 2**16 else 4
    chunks, need = 0, 0
    for each in sets:
        of_set = each.step_size * each.steps * settings.block_size // C
        chunks += of_set
        if k:  # once for each chunk of the documents
            need += bytes_of(min(of_set, each.chunks), 17, 20 * (k + SPARE))
            need += bytes_of(min(rows, k * of_set), 8, 2 + 2 * token * C)
        if P:  # once for each chunk of a sequence
            need += bytes_of(of_set, 16, C * P * (token + 2))
    need /= USABLE * 2**30
    tell(f'{chunks:,} chunks, whose neighbors and pointers take up to {need:,.2f} GB of the cache')
    if need > settings.retrieval_cache_gb:
        raise UserError(f'the neighbors and pointers of {chunks:,} chunks take up to {need:,.2f} GB, and '
                        f'retrieval_cache_gb is {settings.retrieval_cache_gb:g}: raise it, or lower max_iters, '
                        f'eval_tokens or retrieval_pointers')


def precompute(sequences, ranks, label, cache, knowledge_base, state, find_state):
    """This rank's share of a set: what is missing of it, with a record of how far it is every SAVE seconds."""
    settings, train, steps = sequences.settings, sequences.train, sequences.steps
    record = record_of(cache, label, sequences.identity, sequences.step_size, ranks.world_size, ranks.rank) | dict(
        revision=state, rows=int(state.split()[1]), made_by=vars(knowledge_base.metadata))
    name, L = sequences.identity['set'], settings.block_size // settings.retrieval_chunk_size
    began, before, saved = time.monotonic(), record['done'], time.monotonic()

    def save(done, place):
        ranks.check()
        if find_state() != state:
            raise UserError('the collection has changed meanwhile: start again when it is complete')
        put_record(cache, record | dict(done=done, state=place), settings)
    own = sequences.step_size // ranks.world_size if train else -(-sequences.step_size // ranks.world_size)  # of a step
    with tqdm(total=steps * own * L, initial=before * own * L, desc=name, unit=' chunks', unit_scale=True,
              disable=not ranks.is_master or not sys.stderr.isatty()) as bar:
        device, count = pick_device(ranks.device(settings.device)), steps - before
        with closing(Loader(settings, train | dict(state=record['state']), count, device=device, say=say) if train else
                     Loader(settings, val=dict(rank=ranks.rank, world_size=ranks.world_size), device=device, say=say)
                     ) if count > 0 else nullcontext() as loader:
            if loader:
                loader.device = torch.device('cpu')  # of its batches: the GPU is for embedding
            if train:
                for done in range(before + 1, steps + 1):
                    place = loader.next().state
                    bar.update(own * L)
                    if done == steps or time.monotonic() - saved > SAVE:
                        save(done, place)
                        saved = time.monotonic()
            elif loader:
                for batch in loader.val():
                    bar.update(len(batch.tokens) * L)
                save(1, None)
    took, found = time.monotonic() - began, max(0, steps - before) * own * L
    name += f', rank {ranks.rank}' if ranks.world_size > 1 else ''
    print(f'{name}: {steps * own * L:,} chunks are in the cache, {found:,} of them from now'
          + f', {took:.0f} s, {found / took:,.0f} chunks/s' * bool(found), flush=True)


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
