"""
Everything that only a CUDA machine can show, in one command of a few minutes, with no network and no server: that the
model on the GPU equals the CPU's, its causality and masks, compilation without graph breaks, a run that resumes to the
same losses, nccl, sharding; then tokens/s, MFU, memory and waiting of a GPT and of RETRO with frozen, live and
remembered neighbors, at the 124M shape in bfloat16, compiled, from a local collection; the same of config/retro_124m.py
and retro_857m.py with ready tensors, and their memory beside the dry run's; and an embedder of all-mpnet's size.

    python bench/gpu.py [--device=cuda] [--quick] [--out=gpu.json]

It makes its own corpus, embedding and collection from the Python source of the machine, in a temporary folder. Prints a
table, and writes one JSON file after each step, so that a run that is cut short keeps its results. Exit code 1 if a
check fails. --device=cpu --quick is what the tests run.
"""
import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from system import autocast, keep_freed_memory, peak_flops, pick_device, pick_dtype

import torch
import torch.distributed as dist

from bench.train import make_step, measure, summarize
from configurator import load_settings, to_json, user_errors_as_one_line, write_atomically
from data.fingerprint import describe_corpus
from model import RETRO, RETROConfig, SelfAttention, document_starts, takes_documents
from training.checkpoint import load_shards, save_shards
from training.distributed import Ranks
from training.parallel import clip_gradients, gather_weights, local, own_parameters, parallelize
from training.sizes import memory

SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12, gradient_accumulation_steps=1,
             retrieval_layers=[6, 9, 12])
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=128, batch_size=2, gradient_accumulation_steps=1,
             retrieval_layers=[2])
PAPER = dict(token_mix=False, retrieval_copy=False, retrieval_encoder_layers=2)
C, K, L, V = 16, 2, 8, 512


def make_model(device, options, seed=0):
    """A small model with large random weights, so that whatever should reach a logit does."""
    torch.manual_seed(seed)
    model = RETRO(RETROConfig(block_size=L * C, vocab_size=V, n_layer=3, n_head=2, n_embd=64, retrieval_layers=[2, 3],
                              retrieval_chunk_size=C, retrieval_k_neighbors=K, **options))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device)


def make_batch(device, seed=1):
    """Tokens (2, T), neighbors (2, L, K, R), their mask, and doc_ids (2, L) with a border in the first sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (2, L * C), generator=generator)
    neighbors = torch.randint(V, (2, L, K, 2 * C), generator=generator)
    neighbors[..., 3:C] = tokens.view(2, L, 1, C)[..., 3:]  # something to match
    lengths = torch.randint(C, 2 * C + 1, (2, L, K, 1), generator=generator)
    lengths[0, 3] = lengths[1, 2, 1] = 0
    mask = torch.arange(2 * C) < lengths
    doc_ids = torch.tensor([[7] * 4 + [8] * 4, [9] * 8])
    return [x.to(device) for x in (tokens, neighbors, mask, doc_ids)]


def make_pointers(tokens):
    """Pointers (2, T, 4, 3) int32 that depend on the tokens: distinct ones, some without a match."""
    named = (tokens[..., None] * 7 + torch.arange(4, device=tokens.device)) % V
    return torch.stack([named, named % 17, named % 120], dim=-1).int()


def check_equality(device):
    """Logits and gradients of all options are the CPU's, in float32."""
    worst = 0.0
    for options in (PAPER, {}, dict(retrieval_encoder_layers=1), dict(retrieval_longest_match=0)):
        results = []
        for place in ('cpu', device):
            model, (tokens, neighbors, mask, doc_ids) = make_model(place, options), make_batch(place)
            logits, loss = model(tokens, tokens.roll(-1, 1), neighbors, mask, doc_ids, make_pointers(tokens))
            loss.backward()
            results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        for ours, theirs in zip(*results, strict=True):
            worst = max(worst, ((ours - theirs.cpu()).abs().max() / (ours.abs().max() + 1e-6)).item())
    assert worst < 2e-3, f'relative difference {worst:.1e}'
    return f'largest relative difference {worst:.1e}'


@torch.no_grad()
def check_causality(device):
    """Later tokens change no logit, nor do neighbors before their chunk's last token, nor other documents."""
    for options in (PAPER, {}):
        model, (tokens, neighbors, mask, doc_ids) = make_model(device, options).eval(), make_batch(device)
        logits, _ = model(tokens, None, neighbors, mask, doc_ids)
        for t in range(1, L * C, 7):
            other = tokens.clone()
            other[:, t:] = (other[:, t:] + 1) % V
            assert torch.equal(model(other, None, neighbors, mask, doc_ids)[0][:, :t], logits[:, :t]), f'token {t}'
        for u in range(L):
            other = neighbors.clone()
            other[:, u] = (other[:, u] + 1) % V
            changed = (model(tokens, None, other, mask, doc_ids)[0] != logits).any(-1)  # (2, T)
            assert not changed[:, :(u + 1) * C - 1].any(), f'neighbors of chunk {u}'
        other = tokens.clone()
        other[0, :4 * C] = (other[0, :4 * C] + 1) % V
        changed = (model(other, None, neighbors, mask, doc_ids)[0] != logits)[0].any(-1)
        assert not changed[5 * C - 1:].any(), 'another document'
    return 'no leak'


@torch.no_grad()
def check_masks(device):
    """Absent neighbors and absent tokens change nothing."""
    for options in (PAPER, {}):
        model, (tokens, neighbors, mask, doc_ids) = make_model(device, options).eval(), make_batch(device)
        logits, _ = model(tokens, None, neighbors, mask, doc_ids)
        other = torch.where(mask, neighbors, (neighbors + 1) % V)
        assert torch.equal(model(tokens, None, other, mask, doc_ids)[0], logits) and torch.isfinite(logits).all()
    return 'no change'


def check_documents(device):
    """Flash attention over packed documents has the logits and gradients of a dense mask; the time of both."""
    if not takes_documents(torch.device(device).type, torch.bfloat16, 32):
        return 'skipped: flash attention takes no documents here'
    results, seconds = [], []
    block = SelfAttention(RETROConfig(n_head=12, n_embd=768)).to(device, torch.bfloat16)
    x = torch.randn(12, 1024, 768, device=device, dtype=torch.bfloat16)
    for dropout in (0.0, 1e-9):  # dropout needs the mask
        model, (tokens, neighbors, mask, doc_ids) = make_model(device, dict(dropout=dropout)), make_batch(device)
        with autocast('bfloat16', device):
            logits, loss = model(tokens, tokens, neighbors, mask, doc_ids)
        loss.backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        documents = torch.arange(16, device=device).expand(12, 16) // 3
        starts = document_starts(documents, 64)
        documents = documents.repeat_interleave(64, dim=1)
        dense = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        for repeats in (3, 20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                block(x, dense if dropout else starts).sum().backward()
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    worst = max(((a - b).abs().max() / (b.abs().max() + 1e-6)).item() for a, b in zip(*results, strict=True))
    assert worst < 0.05, f'relative difference {worst:.1e}'
    return f'largest relative difference {worst:.1e}; a dense mask takes {seconds[1] / seconds[0]:.2f} times as long'


def check_compilation(device):
    """One graph each for training, evaluation on and off; none again for other batches; the eager model's losses."""
    model = make_model(device, {})
    precision = pick_dtype('auto', device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, **(dict(backend='aot_eager') if device == 'cpu' else {}))

    def losses(called, seed):
        tokens, neighbors, mask, doc_ids = make_batch(device, seed)
        pointers = make_pointers(tokens)
        with autocast(precision, device):
            training = called.train()(tokens, tokens, neighbors, mask, doc_ids, pointers)[1]
        training.backward()
        with torch.no_grad(), autocast(precision, device):
            on, off = (called.eval()(tokens, tokens, *given[:2], doc_ids, given[2])[1]
                       for given in ((neighbors, mask, pointers), (None, None, None)))
        return torch.stack([training.detach(), on, off])

    for seed in (1, 2, 3):
        torch.testing.assert_close(losses(compiled, seed), losses(model, seed), rtol=0.02, atol=0)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    assert graphs == 3, f'{graphs} graphs'
    return '3 graphs'


@contextmanager
def one_rank(device):
    """A process group of this process; the backend."""
    backend = 'nccl' if device.startswith('cuda') else 'gloo'
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group(backend, init_method=f'file://{file.name}', rank=0, world_size=1)
        try:
            yield backend
        finally:
            dist.destroy_process_group()
            Path(file.name).touch()


def check_nccl(device):
    """A process group of one rank sums and broadcasts, and DDP trains."""
    with one_rank(device) as backend:
        total = torch.ones(3, device=device)
        dist.all_reduce(total)
        model = torch.nn.parallel.DistributedDataParallel(make_model(device, {}))
        tokens, neighbors, mask, doc_ids = make_batch(device)
        model(tokens, tokens, neighbors, mask, doc_ids, make_pointers(tokens))[1].backward()
        gradients = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert total.tolist() == [1.0] * 3 and gradients
    return f'{backend}, one rank'


def check_sharding(device):
    """
    The shards of one rank, with blocks that are checkpointed and, on a GPU, compiled one by one, train to the losses of
    the whole model; their weights and optimizer are saved, and read again, as they are.
    """
    precision, found = pick_dtype('auto', device), {}
    (tokens, neighbors, mask, doc_ids), peaks = make_batch(device), {}
    with one_rank(device), tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(device=device, control=dist.new_group(backend='gloo'))
        for which in ('none', 'full', 'selective'):
            settings = SimpleNamespace(parallel='ddp' if which == 'none' else 'fsdp', activation_checkpointing=which)
            torch._dynamo.reset()
            model = make_model('cpu', dict(retrieval_encoder_layers=1))
            called = parallelize(model, settings, ranks, precision, is_compiled=device != 'cpu')
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.split(':')[0])
            if device != 'cpu':
                torch.cuda.reset_peak_memory_stats()
            for _ in range(4):
                with autocast(precision, device):
                    loss = called(tokens, tokens, neighbors, mask, doc_ids, make_pointers(tokens))[1]
                loss.backward()
                clip_gradients(called, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                found.setdefault(which, []).append(loss.detach())
            peaks[which] = 0 if device == 'cpu' else torch.cuda.max_memory_allocated()
        parameters = own_parameters(model)
        states = {name: optimizer.state[p] for name, p in parameters.items()}
        save_shards(states, folder, ranks)
        for name, state in load_shards(folder, parameters).items():
            assert all(torch.equal(local(state[key]).to(device), local(states[name][key])) for key in state), name
        weights = gather_weights(model, ranks)
        assert all(torch.equal(weights[name], local(p).cpu()) for name, p in parameters.items())
    for losses in found.values():
        torch.testing.assert_close(torch.stack(losses), torch.stack(found['none']), rtol=0.02, atol=0)
    return 'the same losses; peaks ' + ', '.join(f'{which} {size / 1e6:.0f} MB' for which, size in peaks.items())


def run(*command, folder):
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    subprocess.run([sys.executable, *map(str, command)], cwd=folder, check=True, stdout=sys.stderr,
                   env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)})


def prepare(folder, is_quick):
    """A corpus, its tokenizer, embedding and collection in the folder; returns the config file."""
    from data.prepare import is_val, write_corpus
    from data.python_source.prepare import read_documents, split
    corpus = folder / 'python_source'
    corpus.mkdir()
    size, documents = 2e6 if is_quick else 28e6, []
    while not any(is_val(name) for name, _ in documents):
        documents, size = read_documents(size)[0], 1.5 * size
    write_corpus(split(documents), corpus, 'this machine gives')
    config = folder / 'config.py'
    config.write_text(f'''
data_cache_dir = '{folder}/datasets'
train_datasets, val_datasets = ['{corpus}/train.parquet'], ['{corpus}/val.parquet']
tokenizer = '{corpus}/tokenizer.json'
retrieval_embedding_model, retrieval_milvus_uri = '{folder}/embedding', '{folder}/milvus.db'
retrieval_cache_dir = '{folder}/neighbors'
retrieval_matches_dir = '{folder}/matches'
''')
    run('-m', 'retrieval.static_embedding', config, folder=folder)
    run('-m', 'retrieval.populate', config, folder=folder)
    return config


def check_resume(folder, config, device, is_quick):
    """train.py, stopped by its step limit and resumed, has the losses of a run that was not."""
    options = [f'--device={device}', '--eval_interval=4', '--log_interval=1', '--eval_tokens=2000', '--warmup_iters=2',
               '--dropout=0.1', f'--compile={not is_quick}', *(f'--{key}={value}' for key, value in SMALL.items())]
    found = []
    for name, steps in (('whole', [8]), ('parts', [4, 8])):
        for number, last in enumerate(steps):
            run(ROOT / 'train.py', config, *options, f'--out_dir={folder}/{name}', f'--max_iters={last}',
                '--lr_decay_iters=8', *['--init_from=resume'] * (number > 0), folder=folder)
        lines = [json.loads(line) for line in (folder / name / 'metrics.jsonl').read_text().splitlines()]
        found.append([line['loss'] for line in lines if 'loss' in line])
    whole, parts = found
    difference = max(abs(a - b) for a, b in zip(whole, parts, strict=True))
    assert difference < (1e-9 if device == 'cpu' else 1e-3), f'losses differ by {difference:.1e}'
    return f'8 losses, largest difference {difference:.1e}'


def measure_speed(config, device, is_quick):
    """By arm tokens/s, MFU, peak memory and the share of the time that it waited for batches; and the corpus."""
    shape = SMALL if is_quick else SHAPE
    settings = load_settings([str(config), *(f'--{key}={value}' for key, value in shape.items()), f'--device={device}',
                              f'--compile={not is_quick}', f'--retrieval_prefetch_batches={4 if is_quick else 16}'])
    with ExitStack() as cleanup:
        arms, retro, gpt = measure(settings, settings.retrieval_prefetch_batches, 1 if is_quick else 3, device,
                                   cleanup, vocab_size=None if is_quick else 50257)
        size = arms['live'].loader.size
    assert is_quick or size >= 100_000, f'the collection has {size:,} chunks, and not 100,000'
    peak, found = peak_flops(device, pick_dtype('auto', device)), summarize(arms)
    for name, figures in found.items():
        model = gpt if name == 'gpt' else retro
        figures['mfu'] = round(model.flops_per_token() * figures['tokens_per_s'] / peak, 4)
        figures['memory_gb'] = round(arms[name].memory / 1e9, 2)
    return found, f'{describe_corpus(settings.train_datasets)}, {size:,} chunks in the collection'


def measure_sizes(device, is_quick):
    """By config, with retrieval and without, from ready random tensors: tokens/s, MFU, GB and those of the dry run."""
    precision, found = pick_dtype('auto', device), {}
    for name, arm in itertools.product(('retro_124m', 'retro_857m'), ('retro', 'gpt')):
        changes = (SMALL if is_quick else dict(gradient_accumulation_steps=1)) | dict(
            use_retrieval=arm == 'retro', compile=not is_quick)
        settings = load_settings([str(ROOT / f'config/{name}.py')]).replace(**changes)
        before = torch.cuda.memory_allocated() if device.startswith('cuda') else 0
        step, model = make_step(settings, 50257, device)
        c, size = model.config, settings.batch_size
        L, R = c.block_size // c.retrieval_chunk_size, 2 * c.retrieval_chunk_size
        tokens = torch.randint(50257, (size, c.block_size), device=device)
        neighbors = torch.randint(50257, (size, L, c.retrieval_k_neighbors, R), device=device)
        batch = SimpleNamespace(tokens=tokens, targets=tokens, doc_ids=torch.zeros(size, L, dtype=int, device=device),
                                retrieved=(neighbors, torch.ones_like(neighbors, dtype=torch.bool), None))
        peak, steps = 0, 2 if is_quick else 20
        for count in (3, steps):  # compiled, and the optimizer's moments are there, after the first
            if device.startswith('cuda'):
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(count):
                step(batch)
            if device.startswith('cuda'):
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before
            rate = count * tokens.numel() / (time.perf_counter() - start)
        expected = sum(memory(settings, model, 1, 'ddp', precision, device != 'cpu', settings.compile).values())
        found[f'{name} {arm}'] = dict(tokens_per_s=round(rate), memory_gb=round(peak / 1e9, 2),
                                      dry_run_gb=round(expected / 1e9, 2),
                                      mfu=round(model.flops_per_token() * rate / peak_flops(device, precision), 4))
        del step, model, batch, tokens, neighbors
        torch._dynamo.reset()
        if device.startswith('cuda'):
            gc.collect()
            torch.cuda.empty_cache()
    return found


@torch.no_grad()
def measure_embedder(device, is_quick):
    """Chunks/s of a transformer of all-mpnet-base-v2's size, random weights, 64 tokens a chunk."""
    from transformers import MPNetConfig, MPNetModel
    config = MPNetConfig(num_hidden_layers=1, hidden_size=48, num_attention_heads=2, intermediate_size=96) if is_quick \
        else MPNetConfig()
    model = MPNetModel(config).to(device).eval()
    tokens, precision = torch.randint(5, 1000, (64 if is_quick else 512, 64), device=device), pick_dtype('auto', device)
    count, start = 0, time.perf_counter()
    for number in range(3 if is_quick else 30):
        with autocast(precision, device):
            model(tokens)
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        if number == 0:
            start = time.perf_counter()
        else:
            count += len(tokens)
    return round(count / (time.perf_counter() - start))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', help="'cuda', 'cuda:1', or 'cpu' to try it (default: %(default)s)")
    parser.add_argument('--quick', action='store_true', help='small shapes, few steps')
    parser.add_argument('--out', default='gpu.json', help='the JSON file (default: %(default)s)')
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    keep_freed_memory()
    started, report, failed = time.time(), {}, []
    report['device'] = torch.cuda.get_device_name() if device.startswith('cuda') else 'CPU'
    report['torch'], report['precision'] = torch.__version__, pick_dtype('auto', device)

    def keep(key, value):
        report[key], report['seconds'] = value, round(time.time() - started)
        write_atomically(to_json(report, indent=1) + '\n', arguments.out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checks = {'equals the CPU': lambda: check_equality(device), 'causality': lambda: check_causality(device),
                  'masks': lambda: check_masks(device), 'documents': lambda: check_documents(device),
                  'compilation': lambda: check_compilation(device), 'process group': lambda: check_nccl(device),
                  'sharding': lambda: check_sharding(device)}
        config = prepare(folder, arguments.quick)
        checks['resume'] = lambda: check_resume(folder, config, device, arguments.quick)
        for check, call in checks.items():
            try:
                keep(check, call())
            except Exception as error:
                traceback.print_exc()
                keep(check, f'FAILED: {type(error).__name__}: {str(error)[:500]}')
                failed.append(check)
            print(f'{check:<24} {report[check]}', flush=True)
        keep('embedder_chunks_per_s', measure_embedder(device, arguments.quick))
        training, corpus = measure_speed(config, device, arguments.quick)
        keep('corpus', corpus)
        keep('training', training)
        keep('sizes', measure_sizes(device, arguments.quick))
    print(f'\n{report["device"]}, {report["precision"]}, corpus {report["corpus"]}\n')
    print(f'{"":<12}{"tokens/s":>12}{"over frozen":>14}{"waited":>10}{"MFU":>8}{"memory":>12}')
    for arm, figures in report['training'].items():
        print(f'{arm:<12}{figures["tokens_per_s"]:>12,}{figures["over_frozen"]:>14.3f}{figures["waited"]:>10.1%}'
              f'{figures["mfu"]:>8.1%}{figures["memory_gb"]:>9.2f} GB')
    print(f'\n{"":<18}{"tokens/s":>12}{"MFU":>8}{"memory":>12}{"dry run":>12}')
    for name, figures in report['sizes'].items():
        print(f'{name:<18}{figures["tokens_per_s"]:>12,}{figures["mfu"]:>8.1%}{figures["memory_gb"]:>9.2f} GB'
              f'{figures["dry_run_gb"]:>9.2f} GB')
    print(f'\nembedder: {report["embedder_chunks_per_s"]:,} chunks/s')
    print(json.dumps(report))
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
