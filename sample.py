"""
Prompts a trained model, which retrieves live whenever a chunk of its text is complete, and shows what it retrieved.

    python sample.py --out_dir=out/quickstart --start="import numpy" --show_neighbors    # and the pointers' sources
    python sample.py --out_dir=out/quickstart --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=200

The checkpoint holds its settings. To reach its knowledge base elsewhere, give --retrieval_milvus_uri=..., and
MILVUS_TOKEN in the environment.
"""
import argparse
import contextlib
import math

import numpy as np
import torch

from configurator import RANGES, UserError, check_range, user_errors_as_one_line, visible
from data.tokenizer import is_token
from retrieval.knowledge_base import FIELDS
from retrieval.retriever import Retriever, neighbor_function, pointer_function
from training.checkpoint import load_pretrained, load_run


def read_start(start):
    """The prompt: the text itself, or the text of FILE:path."""
    if start.startswith('FILE:'):
        path = start[len('FILE:'):]
        try:
            with open(path, encoding='utf-8') as file:
                start = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'prompt file {path!r} cannot be read ({getattr(error, "strerror", None) or error}): give '
                            f'--start=FILE: and the path of a text file') from error
        if not start.strip():
            raise UserError(f'prompt file {path!r} is empty: write a prompt into it')
    if not start:
        raise UserError('--start is empty: give some text to continue, or FILE: and the path of a text file')
    return start


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--out_dir', default='out',
                        help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    parser.add_argument('--init_from', default='', help='instead of an out_dir a GPT-2: gpt2, gpt2-medium, gpt2-large, '
                        'gpt2-xl, or a folder that transformers saved')
    parser.add_argument('--start', default='\n', help='the prompt, or FILE: and the path of one (default: a line end)')
    parser.add_argument('--num_samples', type=int, default=1, help='samples to draw (default: %(default)s)')
    parser.add_argument('--max_new_tokens', type=int, default=256, help='tokens per sample (default: %(default)s)')
    parser.add_argument('--temperature', type=float, default=0.8, help='0: the likeliest token (default: %(default)s)')
    parser.add_argument('--top_k', type=int, default=200, help='of the k likeliest; 0: of all (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=1337, help='random seed (default: %(default)s)')
    parser.add_argument('--show_neighbors', action='store_true', help='print what each chunk retrieved, '
                        'and where the tokens that pointers named were found')
    parser.add_argument('--retrieval', choices=('on', 'off'), default='on',
                        help='off: without neighbors and pointers (default: on)')
    arguments, overrides = parser.parse_known_args()
    for name, least, below in (('num_samples', 1, math.inf), ('max_new_tokens', 1, math.inf),
                               ('temperature', 0, math.inf), ('top_k', 0, math.inf), ('seed', *RANGES['seed'])):
        check_range(f'--{name}', getattr(arguments, name), least, below)
    return arguments, overrides


def main():
    arguments, overrides = parse_arguments()
    start = read_start(arguments.start)
    settings, tokenizer, model, device = (load_pretrained(arguments.init_from, overrides) if arguments.init_from
                                          else load_run(arguments.out_dir, overrides))
    settings = settings.replace(retrieval_cache_gb=0.0)  # prompts are not repeated
    use_retrieval = model.config.use_retrieval and arguments.retrieval == 'on'
    retriever = Retriever(settings, tokenizer) if use_retrieval else None
    with contextlib.closing(retriever) if retriever else contextlib.nullcontext():
        sample(arguments, start, model, tokenizer, retriever, device)


def sample(arguments, start, model, tokenizer, retriever, device):
    prompt = torch.tensor(tokenizer.encode_ordinary(start), device=device)
    tokens = prompt.repeat(arguments.num_samples, 1)  # (B, T)
    retrieved = []  # by chunk, the hits of each sample, (B, K)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    tokens = model.generate(tokens, arguments.max_new_tokens, neighbor_function(retriever, device, retrieved),
                            pointer_function(retriever, device),
                            arguments.temperature, arguments.top_k, tokenizer.eot_token,
                            torch.tensor(is_token(tokenizer), device=device), generator)
    for number, sequence in enumerate(tokens.tolist()):
        new = sequence[len(prompt):]
        end = len(prompt) + (new.index(tokenizer.eot_token) if tokenizer.eot_token in new else len(new))
        if arguments.num_samples > 1:
            print(f'=== sample {number + 1}')
        print(visible(tokenizer.decode(sequence[:end])))
        if arguments.show_neighbors:
            if model.config.has_neighbors:
                show_neighbors(sequence[:end], [hits[number] for hits in retrieved], retriever, model.config, tokenizer)
            if retriever and retriever.matches:
                show_pointers(sequence[:end], len(prompt), retriever, tokenizer)


def show_neighbors(tokens, retrieved, retriever, config, tokenizer):
    """Print each complete chunk, and below it the neighbors that the text after it was written with."""
    C = config.retrieval_chunk_size
    print('\n--- what was retrieved')
    if not retrieved:
        print(f'nothing: no chunk of {C} tokens was completed, or retrieval is off')
    for number, hits in enumerate(retrieved[:len(tokens) // C]):
        print(f'\nchunk {number + 1}: {one_line(tokenizer.decode(tokens[number * C:(number + 1) * C]))}')
        hits = hits[hits['score'] > -np.inf]
        rows = retriever.knowledge_base.rows(hits['id'], FIELDS)
        for rank, hit in enumerate(hits, start=1):
            row = rows[hit['id']]
            continuation = tokenizer.decode([t for t in row['tokens'][C:] if t != tokenizer.eot_token])
            print(f'  {rank}. {visible(row["document"])}, chunk {row["position"] + 1}, similarity {hit["score"]:.2f}')
            print(f'     {one_line(row["text"].replace("<|endoftext|>", ""))}')
            print(f'     then: {one_line(continuation)}')


def show_pointers(tokens, first, retriever, tokenizer):
    """
    Print where the new tokens, from the index `first` on, stand that a pointer named: runs that follow each other there
    as they do here.
    """
    tokens = np.array(tokens)
    # matches are short: it does not matter that the model may have read less of what precedes
    pointers = retriever.point(tokens[None])[0]
    runs, named = [], 0  # [first token, number of tokens, document, place]
    for t in range(max(1, first), len(tokens)):
        if ((pointers[t - 1, :, 0] == tokens[t]) & (pointers[t - 1, :, 1] > 0)).any():
            _, document, place = retriever.index.where(tokens, np.zeros(1, dtype=np.int64), t - 1)
            named += 1
            if runs and runs[-1][2] == document and t - runs[-1][0] == runs[-1][1] == place - runs[-1][3]:
                runs[-1][1] += 1
            else:
                runs.append([t, 1, document, place])
    print(f'\n--- what pointers named: {named} of {len(tokens) - first} new tokens; runs of two or more')
    C = retriever.chunk_size
    runs = [run for run in runs if run[1] > 1]
    rows = retriever.knowledge_base.rows_at(sorted({(doc, place // C) for _, _, doc, place in runs}), ['document'])
    for t, count, document, place in runs:
        name = rows.get((document, place // C), {}).get('document', 'a deleted row')
        text = one_line(tokenizer.decode(tokens[t:t + count].tolist()))
        print(f'  {text!r}: {visible(name)}, chunk {place // C + 1}')


def one_line(text, width=400):
    text = visible(text).replace('\n', '⏎')
    return text if len(text) <= width else text[:width] + ' …'


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
