"""
Which embedding model should fill the collection? Fills one with each model from the same documents, and trains the same
RETRO on it, with neighbors alone and beside pointers; a GPT and pointers alone stand beside them. Also counts, on the
val documents: how many next tokens the neighbors predict, by the longest run of the last tokens that stands in them;
and whether dense similarity tells which of equally long exact matches is meant, that is, how often the token after a
match is the right one if any of them is taken, and if one of the document that the chunk before finds nearest is.

    python bench/embeddings.py config/quickstart.py config/peps.py --tokenizer=gpt2 --models=static,all-MiniLM-L6-v2

'static' is fitted on the documents (retrieval.static_embedding); the others are names or folders of sentence-
transformers. --chunks=10000 limits the documents. Prints a table and one JSON line; writes into out_dir/embeddings.
What is there already is not done again.
"""
import json
import math
import os
import re
import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.quality import run
from configurator import UserError, load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.corpus import val_batches
from data.documents import as_dataset_configs, load_documents
from data.tokenizer import load_tokenizer
from model import chunk_windows, count_matches
from retrieval.match_index import run_lengths
from retrieval.retriever import Retriever
from training.metrics import metrics_path, read_metrics

FLAGS = ('models', 'chunks')
SEARCHED = 256  # neighbors whose documents guide among equal matches
LENGTHS = (1, 2, 3, 4)  # of these matches, in tokens


def take_documents(settings, tokenizer, count, folder):
    """A Parquet file of as many train documents as make `count` chunks."""
    path = f'{folder}/train.parquet'
    if not os.path.exists(path):
        ids, texts = [], []
        for document in load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets')):
            count -= len(tokenizer.encode_ordinary(document.text)) // settings.retrieval_chunk_size + 1
            ids.append(document.id)
            texts.append(document.text)
            if count <= 0:
                break
        os.makedirs(folder, exist_ok=True)
        pq.write_table(pa.table({'id': ids, 'text': texts}), path)
    return path


def fill(arguments, model, folder):
    """Fill the collection once. Chunks/s that were embedded."""
    path = f'{folder}/populated.txt'
    if not os.path.exists(path):
        if model == 'static':
            # it has a tokenizer of its own, that of the corpus
            run('-m', 'retrieval.static_embedding', *[a for a in arguments if not a.startswith('--tokenizer=')])
        answer = run('-m', 'retrieval.populate', *arguments)
        Path(path).write_text(answer)
    found, = re.findall(r'embed ([\d,]+)', Path(path).read_text())
    return int(found.replace(',', ''))


def train(arguments, folder, **options):
    """bpb with retrieval, if there is any, of a run that is trained unless it is there."""
    if not os.path.exists(f'{folder}/done'):
        print(f'training {folder}', file=sys.stderr)
        run(str(ROOT / 'train.py'), *arguments, f'--out_dir={folder}', '--eval_interval=1000000',
            *(f'--{key}={value}' for key, value in options.items()))
        Path(f'{folder}/done').touch()
    *_, last = (line for line in read_metrics(metrics_path(folder)) if 'val_bpb_off' in line)
    return last.get('val_bpb_on', last['val_bpb_off'])


def count_predicted(batch, settings):
    """Of the targets that neighbors may predict: how many there are, and how many of them they do."""
    tokens, neighbors = torch.from_numpy(batch.tokens), torch.from_numpy(batch.neighbors).long()
    mask, C = torch.from_numpy(batch.neighbor_mask), settings.retrieval_chunk_size
    has_next = mask & torch.nn.functional.pad(mask[..., 1:], (0, 1))
    B, L = has_next.shape[:2]
    matches = count_matches(chunk_windows(tokens, L, C, C), neighbors.flatten(0, 1), C).int().view(B, L, C, -1)
    matches = matches * has_next.flatten(2)[:, :, None]  # (B, L, C, M)
    longest, place = matches.max(-1)
    following = neighbors.roll(-1, -1).flatten(2)  # (B, L, M)
    guess = following[:, :, None].expand_as(matches).gather(-1, place[..., None])[..., 0]
    targets = torch.nn.functional.pad(torch.from_numpy(batch.targets)[:, C - 1:], (0, C - 1), value=-1).view_as(guess)
    reads = (mask.flatten(2).any(-1) & ~torch.from_numpy(batch.is_last_chunk))[..., None] & (targets >= 0)
    return np.array([reads.sum(), (reads & (longest > 0) & (guess == targets)).sum()])


def count_guided(batch, retriever, end_of_text):
    """
    For each of LENGTHS, of the targets whose longest match has this length and goes on differently at different places:
    how many there are, and the sums of their chances to be right if any of the places is taken, and if one of the
    document that the chunk before finds nearest is, where one of the places is in any of the documents found.
    """
    C, counts = retriever.chunk_size, np.zeros((len(LENGTHS), 3))
    run_of = run_lengths(batch.tokens, batch.doc_ids, end_of_text)
    chunks = batch.tokens.reshape(-1, C)
    vectors = retriever.embedder.embed([retriever.tokenizer.decode(chunk) for chunk in chunks.tolist()])
    hits = retriever.knowledge_base.search(vectors, SEARCHED)['doc_id'].reshape(*batch.doc_ids.shape, -1)
    segment, = retriever.index.segments
    lengths, next_tokens, places = segment.places(batch.tokens, batch.doc_ids, run_of, end_of_text)
    for b, t in zip(*np.nonzero(batch.targets >= 0), strict=True):
        longest = lengths[b, t, 0]
        if longest not in LENGTHS or t < C or batch.doc_ids[b, t // C] != batch.doc_ids[b, t // C - 1]:
            continue
        is_equal = lengths[b, t] == longest
        is_right = next_tokens[b, t, is_equal] == batch.targets[b, t]
        numbers = np.searchsorted(segment.starts, places[b, t, is_equal], side='right') - 1
        rank_of = {doc_id: rank for rank, doc_id in reversed(list(enumerate(hits[b, t // C - 1].tolist())))}
        ranks = np.array([rank_of.get(doc_id, SEARCHED) for doc_id in segment.doc_ids[numbers].tolist()])
        if ranks.min() < SEARCHED and len(set(next_tokens[b, t, is_equal].tolist())) > 1:
            counts[LENGTHS.index(longest)] += 1, is_right.mean(), is_right[ranks == ranks.min()].mean()
    return counts


def look(settings, tokenizer):
    """The share of targets that the neighbors predict, and for LENGTHS the shares that are right, any and guided."""
    datasets = open_datasets(as_dataset_configs(settings.val_datasets, 'val_datasets'), tokenizer, settings)
    batches = val_batches(datasets, tokenizer, settings.block_size, settings.batch_size, settings.eval_tokens)
    predicted, guided = 0, 0
    with closing(Retriever(settings, tokenizer)) as retriever:
        for batch in retriever.retrieve_for(batches):
            predicted = predicted + count_predicted(batch, settings)
            guided = guided + count_guided(batch, retriever, tokenizer.eot_token)
    return predicted[1] / predicted[0], (guided[:, 1:] / guided[:, :1]).tolist(), guided[:, 0].tolist()


def main():
    flags = {key: value for key, _, value in (a[2:].partition('=') for a in sys.argv[1:] if a.startswith('--'))
             if key in FLAGS}
    arguments = [a for a in sys.argv[1:] if a[2:].partition('=')[0] not in FLAGS]
    if 'models' not in flags:
        raise UserError("name the embedding models: --models=static,sentence-transformers/all-MiniLM-L6-v2")
    settings = load_settings(arguments)
    tokenizer = load_tokenizer(settings.tokenizer)
    folder = f'{settings.out_dir}/embeddings'
    documents = take_documents(settings, tokenizer, int(flags.get('chunks', 10000)), folder)
    arguments += [f"--train_datasets=['{documents}']", f'--retrieval_cache_dir={folder}/neighbors',
                  f'--retrieval_matches_dir={folder}/matches']
    report, given = {'GPT': {}, 'pointers alone': {}}, {}
    for model in flags['models'].split(','):
        name = os.path.basename(model.rstrip('/'))
        path = f'{folder}/{name}'
        os.makedirs(path, exist_ok=True)
        embedding = f'{path}/embedding' if model == 'static' else model
        given[name] = [*arguments, f'--retrieval_milvus_uri={path}/milvus.db',
                       f'--retrieval_embedding_model={embedding}']
        report[name] = found = dict(chunks_per_s=fill(given[name], model, path))
        found['predicted'], found['guided'], found['guided_targets'] = look(
            load_settings([*given[name], '--retrieval_k_neighbors=2']), tokenizer)
        print(name, found, file=sys.stderr)
    any_of_them = next(iter(given.values()))
    report['GPT']['bpb'] = train(any_of_them, f'{folder}/gpt', use_retrieval=False)
    report['pointers alone']['bpb'] = train(any_of_them, f'{folder}/pointers', retrieval_k_neighbors=0)
    for name in given:
        path = f'{folder}/{name}'
        report[name]['bpb'] = train(given[name], f'{path}/neighbors_alone', retrieval_k_neighbors=2,
                                    retrieval_pointers=0)
        report[name]['bpb_with_pointers'] = train(given[name], f'{path}/both', retrieval_k_neighbors=2)
    print(f'{"":<24}{"chunks/s":>10}{"predicted":>11}{"bpb":>9}{"with pointers":>15}   of {LENGTHS} tokens: right if '
          f'any is taken, and if guided')
    for name, found in report.items():
        guided = '   '.join(f'{chance:.1%} {near:.1%}' for chance, near in found.get('guided', []))
        print(f'{name:<24}{found.get("chunks_per_s", ""):>10}{found.get("predicted", math.nan):>11.1%}'
              f'{found["bpb"]:>9.4f}{found.get("bpb_with_pointers", math.nan):>15.4f}   {guided}')
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
