"""
Finds ahead of time the neighbors and pointers that a run will read, and stores them in the neighbor cache:

    python -m retrieval.precompute config/x.py
    torchrun --standalone --nproc_per_node=4 -m retrieval.precompute config/x.py    # shared by four processes
    python train.py config/x.py --retrieval_offline=True                            # without a database from here on

They are those of the run's own sequences, max_iters steps of them in their order, and of its val text. Run again it
goes on where it was, wherever it was killed. --datasets=FILE,FILE adds further sets, each as the val text of a run. The
cache is a folder of one node: on several, run it on each of them, or copy retrieval_cache_dir.
"""
import os
import sys
import time
from contextlib import closing, nullcontext

from system import pick_device, say

from tqdm import tqdm

from configurator import UserError, load_settings, named_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.corpus import val_batches
from data.documents import as_dataset_configs
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.knowledge_base import open_as_made, take_from_collection
from retrieval.leaks import SPARE
from retrieval.loader import Loader
from retrieval.match_index import describe_revision
from retrieval.neighbor_cache import USABLE, bytes_of
from retrieval.offline import label_of, open_cache, put_record, record_of, train_set, val_set

SAVE = 2.0  # seconds between two records of how far it is


def main():
    arguments, further = sys.argv[1:], []
    if '--help' in arguments or '-h' in arguments:
        print(f'{__doc__}\n  --datasets=FILE,FILE\n        further sets\n')
    for argument in [a for a in arguments if a.startswith('--datasets=')]:
        arguments.remove(argument)
        further += [path for path in argument.partition('=')[2].split(',') if path]
    settings, (rank, world_size) = load_settings(arguments), find_share()
    tell = say if rank == 0 else lambda news: None
    settings = take_from_collection(settings.replace(retrieval_offline=False), named_settings(arguments), tell)
    if not settings.use_retrieval or not (settings.retrieval_k_neighbors or settings.retrieval_pointers):
        raise UserError('the run reads neither neighbors nor pointers, so there is nothing to precompute: set '
                        'use_retrieval, and retrieval_k_neighbors or retrieval_pointers')
    tokenizer = load_tokenizer(settings.tokenizer)
    with closing(open_as_made(settings)) as knowledge_base, closing(open_cache(settings)) as cache:
        revision = describe_revision(knowledge_base)
        label = label_of(settings, vocabulary_hash(tokenizer))
        if dropped := cache.drop_records(but=revision):
            tell(f'the collection has changed since {dropped} sets were precomputed: they are dropped')
        cache.use_revision(revision)
        train, sets = plan(settings, tokenizer, further, rank, world_size, tell)
        check_room(settings, tokenizer, knowledge_base.count(), sets, tell)
        for sequences_of, changed, step_size, steps, _ in sets:
            precompute(changed, train if sequences_of['set'] == 'train' else None, sequences_of, step_size, steps,
                       rank, world_size, label, cache, knowledge_base, revision)


def find_share():
    """This process' rank and the number of processes, by torchrun's environment."""
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in
                               (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_WORLD_SIZE', os.environ.get('WORLD_SIZE', 1))))
    if local != world_size:
        raise UserError(f'{world_size} processes are on several nodes, and the cache is a folder of one: run this on '
                        f'each node, or on one and copy retrieval_cache_dir')
    return rank, world_size


def plan(settings, tokenizer, further, rank, world_size, tell):
    """
    The arguments of this rank's SequenceStream; and for each set what identifies its sequences, the settings to open it
    with, the sequences of a step of all ranks, the number of steps, and the chunks of its documents.
    """
    def open_setting(name, settings=settings):
        configs = as_dataset_configs(getattr(settings, name), name)
        for config in configs:
            if config.streaming:
                raise UserError(f'{config.path!r} is streamed: which of its documents a run reads when is known only '
                                f'while it trains; set streaming=False to precompute')
        return open_datasets(configs, tokenizer, settings, tell)
    size = settings.batch_size
    train = dict(batch_size=size, step_size=size * world_size, first=size * rank, count=size, seed=settings.seed)
    datasets = open_setting('train_datasets')
    steps = -(-settings.max_iters * size * settings.gradient_accumulation_steps // train['step_size'])
    sets = [(train_set(settings, SequenceStream(datasets, settings.block_size, **train)), settings, train['step_size'],
             steps, sum(dataset.num_chunks for dataset in datasets))]
    for changed in [settings, *(settings.replace(val_datasets=[path]) for path in further)]:
        datasets = open_setting('val_datasets', changed)
        batches = val_batches(datasets, tokenizer, settings.block_size, size, settings.eval_tokens)
        count = sum(int((batch.targets >= 0).any(1).sum()) for batch in batches)  # others fill up the last batch
        sets.append((val_set(settings, datasets), changed, count, 1, sum(dataset.num_chunks for dataset in datasets)))
    return train, sets


def check_room(settings, tokenizer, rows, sets, tell):
    """UserError if what the sets need may not fit into the cache."""
    C, k, P = settings.retrieval_chunk_size, settings.retrieval_k_neighbors, settings.retrieval_pointers
    token = 2 if tokenizer.n_vocab <= 2**16 else 4
    chunks, need = 0, 0
    for _, _, step_size, steps, of_documents in sets:
        of_set = step_size * steps * settings.block_size // C
        chunks += of_set
        if k:  # once for each chunk of the documents
            need += bytes_of(min(of_set, of_documents), 17, 20 * (k + SPARE))
            need += bytes_of(min(rows, k * of_set), 8, 2 + 2 * token * C)
        if P:  # once for each chunk of a sequence
            need += bytes_of(of_set, 16, C * P * (token + 2))
    need /= USABLE * 2**30
    tell(f'{chunks:,} chunks, whose neighbors and pointers take up to {need:,.2f} GB of the cache')
    if need > settings.retrieval_cache_gb:
        raise UserError(f'the neighbors and pointers of {chunks:,} chunks take up to {need:,.2f} GB, and '
                        f'retrieval_cache_gb is {settings.retrieval_cache_gb:g}: raise it, or lower max_iters, '
                        f'eval_tokens or retrieval_pointers')


def precompute(settings, train, sequences_of, step_size, steps, rank, world_size, label, cache, knowledge_base,
               revision):
    """This rank's share of a set: what is missing of it, with a record of how far it is every SAVE seconds."""
    record = record_of(cache, label, sequences_of, step_size, world_size, rank) | dict(
        revision=revision, rows=knowledge_base.count(), made_by=vars(knowledge_base.metadata))
    name, L = sequences_of['set'], settings.block_size // settings.retrieval_chunk_size
    began, before, saved = time.monotonic(), record['done'], time.monotonic()

    def save(done, state):
        if describe_revision(knowledge_base) != revision:
            raise UserError('the collection has changed meanwhile: start again when it is complete')
        put_record(cache, record | dict(done=done, state=state), settings)
    own = step_size // world_size if train else -(-step_size // world_size)  # sequences of a step
    with tqdm(total=steps * own * L, initial=before * own * L, desc=name, unit=' chunks', unit_scale=True,
              disable=rank > 0 or not sys.stderr.isatty()) as bar:
        device = pick_device(settings.device)
        count = steps - before
        with closing(Loader(settings, train | dict(state=record['state']), count, device=device, say=say) if train else
                     Loader(settings, val=dict(rank=rank, world_size=world_size), device=device, say=say)
                     ) if count > 0 else nullcontext() as loader:
            if train:
                for done in range(before + 1, steps + 1):
                    state = loader.next().state
                    bar.update(own * L)
                    if done == steps or time.monotonic() - saved > SAVE:
                        save(done, state)
                        saved = time.monotonic()
            elif loader:
                for batch in loader.val():
                    bar.update(len(batch.tokens) * L)
                save(1, None)
    took, found = time.monotonic() - began, max(0, steps - before) * own * L
    print(f'{name}{f", rank {rank}" if world_size > 1 else ""}: {steps * own * L:,} chunks are in the cache, {found:,} '
          f'of them from now' + f', {took:.0f} s, {found / took:,.0f} chunks/s' * bool(found), flush=True)


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
