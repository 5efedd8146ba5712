"""
Writes a trained model as a folder that Hugging Face transformers loads, and uploads it if asked to.

    python export.py --out_dir=out/quickstart --to=out/quickstart_export
    python export.py --out_dir=out/quickstart --to=out/quickstart_export --push_to_hub=me/my-retro --private

A GPT without token_mix and copy_own_context is written as a plain GPT-2. Any other model comes with its code, which
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) runs. The card, README.md, states what
python -m evaluation has measured. train.py --init_from=FOLDER starts from the weights.
"""
import argparse
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict

from system import quiet_transformers

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import UserError, reason_of, sync, to_json, user_errors_as_one_line, visible, write_atomically
from data.tokenizer import END_OF_TEXT, is_token
from training.checkpoint import describe_write_error, load_checkpoint, load_run

ROOT = os.path.dirname(os.path.abspath(__file__))
CODE = ('model.py', 'modeling_nanoretro.py', 'LICENSE')  # copied, but for a plain GPT-2
FILES = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
         'README.md', *CODE}
MARK = 'nanoretro_export'  # the key of config.json by which an export is known; its value is the layout's version
PROBE = (f'It\'s 1,234.5 or "naïve"?\n\n    def f(x):\n\t\treturn x  # 日本語 🎉\r\n{" " * 40}x '
         f'{"".join(map(chr, range(32, 0x250)))}')


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--out_dir', default='out',
                        help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    parser.add_argument('--to', required=True, metavar='FOLDER', help='the folder to write; one that an earlier export '
                        'wrote is replaced')
    parser.add_argument('--push_to_hub', metavar='NAME', help='upload it to this repository of the Hugging Face Hub, '
                        'with the token of `hf auth login` or HF_TOKEN')
    parser.add_argument('--private', action='store_true', help='make the repository a private one')
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.private and not arguments.push_to_hub:
        raise UserError('--private is of a repository, and nothing is uploaded: give --push_to_hub=NAME, too')
    if arguments.push_to_hub:
        check_repository(arguments.push_to_hub)
    folder = os.path.realpath(arguments.to)
    check_replaceable(folder, arguments.to)
    checkpoint = load_checkpoint(arguments.out_dir)
    _, tokenizer, model, _ = load_run(checkpoint.folder, ['--device=cpu'])
    evaluation = read_evaluation(arguments.out_dir, checkpoint.step)
    with open(checkpoint.tokenizer_path, encoding='utf-8') as file:
        tokenizer_text = as_transformers_reads_it(file.read())
    name = arguments.push_to_hub or os.path.basename(folder)
    card = model_card(name, model, checkpoint.step, evaluation)
    replace_folder(folder, lambda tmp: write_folder(tmp, model, tokenizer, tokenizer_text, card))
    kind, names = 'GPT-2' if is_plain(model.config) else 'model and its code', ', '.join(sorted(os.listdir(folder)))
    print(f'{arguments.to} holds the {kind} of step {checkpoint.step}, {model.num_parameters() / 1e6:.2f} M '
          f'parameters: {names}')
    if evaluation is None:
        print('its README.md says that it has not been evaluated: run python -m evaluation, and export again')
    if arguments.push_to_hub:
        print(f'uploaded to {push(folder, arguments)}')


def is_plain(config):
    """Whether GPT-2 is the same function."""
    return not (config.token_mix or config.copy_own_context or config.has_neighbors or config.has_pointers)


def write_folder(folder, model, tokenizer, tokenizer_text, card):
    """Write all files. UserError if transformers would read the tokenizer in another way than we do."""
    plain, c = is_plain(model.config), model.config
    weights = gpt2_weights(model) if plain else {f'model.{name}': p.detach() for name, p in model.named_parameters()}
    save_file(weights, f'{folder}/model.safetensors', metadata=dict(format='pt'))
    if plain:
        config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocab_size,
                      n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                      bias=c.bias, activation_function='gelu_new', layer_norm_epsilon=1e-5,
                      **dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout))
    else:
        config = dict(architectures=['NanoRetroForCausalLM'], model_type='nanoretro', **asdict(c),
                      auto_map=dict(AutoConfig='modeling_nanoretro.NanoRetroConfig',
                                    AutoModelForCausalLM='modeling_nanoretro.NanoRetroForCausalLM'))
        for name in CODE:
            shutil.copyfile(f'{ROOT}/{name}', f'{folder}/{name}')
    end = tokenizer.eot_token
    config |= {'tie_word_embeddings': True, 'dtype': 'float32', 'bos_token_id': end, 'eos_token_id': end, MARK: 1}
    # rows that pad the embedding, and gaps in the vocabulary, are never to be chosen
    tokens = is_token(tokenizer)
    none = [i for i in range(c.vocab_size) if i >= len(tokens) or not tokens[i]]
    generation = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end, suppress_tokens=none or None,
                      use_cache=plain)
    for name, text in (('config.json', to_json(config, indent=2)), ('README.md', card),
                       ('generation_config.json', to_json(generation, indent=2)), ('tokenizer.json', tokenizer_text),
                       ('tokenizer_config.json', to_json(tokenizer_config(c), indent=2))):
        write_atomically(text, f'{folder}/{name}')
    shutil.copymode(f'{folder}/config.json', f'{folder}/model.safetensors')  # which safetensors hides from others
    check_tokenizer(folder, tokenizer)


def gpt2_weights(model):
    """The weights of a decoder without extras by GPT-2's names and shapes; biases that it does not have are zero."""
    ours, weights = dict(model.named_parameters()), {}
    for name, parameter in ours.items():
        weights[name] = (parameter.t() if '.c_' in name else parameter).detach().contiguous()  # GPT-2's are (in, out)
        bias = f'{name.rpartition(".")[0]}.bias'
        if bias not in ours and '.wte.' not in name and '.wpe.' not in name:
            weights[bias] = torch.zeros(len(parameter))
    return weights


def tokenizer_config(config):
    """What AutoTokenizer needs beside tokenizer.json."""
    return dict(tokenizer_class='PreTrainedTokenizerFast', eos_token=END_OF_TEXT, model_max_length=config.block_size,
                clean_up_tokenization_spaces=False, model_input_names=['input_ids', 'attention_mask'])


def as_transformers_reads_it(text):
    """
    The text of a tokenizer.json, unchanged unless it says what load_tokenizer ignores and transformers would do:
    truncating, padding, adding tokens at the ends. Without the decoder of bytes, transformers would join tokens by
    spaces.
    """
    saved = json.loads(text)
    changed = saved | dict(truncation=None, padding=None)
    if (saved.get('post_processor') or {}).get('type') != 'ByteLevel':
        changed['post_processor'] = None
    if (saved.get('decoder') or {}).get('type') != 'ByteLevel':
        changed['decoder'] = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    return text if all(saved.get(key) == value for key, value in changed.items()) else json.dumps(
        changed, ensure_ascii=False, indent=2)


def check_tokenizer(folder, tokenizer):
    """UserError if AutoTokenizer does not give the ids that we give, or does not decode them."""
    from transformers import AutoTokenizer
    quiet_transformers()
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ours = tokenizer.encode_ordinary(PROBE)
    if theirs(PROBE)['input_ids'] != ours or theirs.decode(ours) != PROBE or theirs.eos_token_id != tokenizer.eot_token:
        raise UserError('transformers does not read the tokenizer.json of this run as nanoRETRO does, and would feed '
                        'the model other tokens: train with a byte-level BPE that both read alike')


def read_evaluation(out_dir, step):
    """The figures of evaluation.json in out_dir, or None if there is none, or if it is of another step."""
    path = os.path.join(out_dir, 'evaluation.json')
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        found['corpus'], found['bpb_off']
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path!r} cannot be read ({reason_of(error)}): run python -m '
                        f'evaluation again, or remove it') from error
    return found if found.get('step', step) == step else None


def model_card(name, model, step, evaluation):
    """README.md: what the model is, its measured figures or that there are none, and how it is loaded."""
    c, plain = model.config, is_plain(model.config)
    kind = 'RETRO' if c.has_neighbors or c.has_pointers else 'GPT'
    tags, trust = (['nanoretro'], '') if plain else (['nanoretro', 'custom_code'], ', trust_remote_code=True')
    reads = [f'{c.retrieval_k_neighbors} neighbors for each chunk of {c.retrieval_chunk_size} tokens'] * c.has_neighbors
    reads += [f'{c.retrieval_pointers} pointers for each token'] * c.has_pointers
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', f'tags: {to_json(tags)}', '---', '',
             f'# {name}', '',
             f'A {kind} of {model.num_parameters() / 1e6:.2f} M parameters, trained with nanoRETRO for {step:,} steps: '
             f'{c.n_layer} blocks of width {c.n_embd}, {c.block_size} tokens of context.']
    if reads:
        lines += [f'It reads {" and ".join(reads)} from a knowledge base, which is not part of this folder. Without '
                  f'them it is a language model, too, with the figures of "retrieval off".']
    lines += ['', '## Evaluation', '', *describe_evaluation(evaluation), '', '## Loading', '', '```python',
              'from transformers import AutoModelForCausalLM, AutoTokenizer', '',
              f'name = {name!r}  # on the Hub, or the path of this folder',
              f'tokenizer = AutoTokenizer.from_pretrained(name{trust})',
              f'model = AutoModelForCausalLM.from_pretrained(name{trust})',
              "inputs = tokenizer('Once upon a time', return_tensors='pt')",
              'print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))', '```', '']
    if not plain:
        lines += ['`trust_remote_code=True` runs `modeling_nanoretro.py` and `model.py` of this folder: read them '
                  'first. They are under the MIT license in `LICENSE`.', '']
    if reads:
        arguments = ('`neighbors` (B, L, K, R) and `neighbor_mask`, ' * c.has_neighbors
                     + '`pointers` (B, T, P, 3), ' * c.has_pointers)
        lines += [f'`forward` takes {arguments}`doc_ids` (B, T / C) as `modeling_nanoretro.py` describes them. To '
                  f'retrieve live, `model.model` is the network as nanoRETRO has it: its `generate` calls a function '
                  f'for each completed chunk and for each token.', '']
    lines += ['In nanoRETRO, `python train.py --init_from=FOLDER` starts from these weights.']
    return visible('\n'.join(lines)) + '\n'


def describe_evaluation(evaluation):
    """The lines of the card about evaluation.json. Paths are shortened: they may name the user's folders."""
    if evaluation is None:
        return ['This model has not been evaluated. nanoRETRO does it with `python -m evaluation --out_dir=OUT_DIR`; '
                'exported again, this card has the figures.']
    corpus = ', '.join(os.path.basename(part.rstrip('/')) for part in str(evaluation['corpus']).split(', '))
    arms = [(name, evaluation.get(key)) for name, key in (
        ('retrieval on', 'bpb_on'), ('retrieval off' if 'bpb_on' in evaluation else 'this model', 'bpb_off'),
        ('a GPT of the same decoder', 'bpb_baseline'))]
    rows = [f'| {name} | {figure:.4f} |' for name, figure in arms if figure is not None]
    lines = [f'Bits per byte of UTF-8 text on {evaluation["tokens"]:,} tokens of the corpus `{corpus}`; compare '
             f'figures only between equal corpora:', '', '| | bits per byte |', '| --- | --- |', *rows]
    notes = [note.replace(str(evaluation.get('baseline')), 'the baseline') for note in evaluation['notes']]
    return [*lines, '', *notes] if notes else lines


def check_replaceable(folder, given):
    """UserError if something is there that an export has not written, or if nothing can be written there."""
    if not given.strip():
        raise UserError("--to is empty: name a folder, such as 'out/export'")
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return
    if not os.path.isdir(folder):
        raise UserError(f'--to {given!r} is a file: name a folder')
    foreign = sorted(set(os.listdir(folder)) - FILES)
    with suppress(OSError, ValueError), open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        saved = json.load(file)
        if not foreign and MARK in saved and 'transformers_version' not in saved:  # which save_pretrained adds
            return
    found = foreign[0] if foreign else 'config.json'
    raise UserError(f'--to {given!r} is not empty, and not as an export left it ({found!r} is not of export.py): name '
                    f'another folder, or remove what is there')


def replace_folder(folder, write):
    """
    Have `write` fill a folder beside it, then rename that: there is the old folder or the new one, never a part of one.
    UserError if that fails; what was there is then as before.
    """
    tmp, old = f'{folder}.{os.getpid()}.tmp', f'{folder}.{os.getpid()}.old'
    try:
        os.makedirs(tmp)
        write(tmp)
        for name in os.listdir(tmp):
            sync(f'{tmp}/{name}')
        sync(tmp)
        if os.path.isdir(folder):
            os.replace(folder, old)
        os.replace(tmp, folder)
        with suppress(OSError):  # some file systems sync no folders
            sync(os.path.dirname(folder))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise UserError(f'{folder} could not be written ({describe_write_error(error, os.path.dirname(folder))}): make '
                        f'room there, or name another folder') from error
    finally:
        if os.path.isdir(old) and not os.path.isdir(folder):
            os.replace(old, folder)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_repository(name):
    """UserError if it is no name of a repository, or if there is no token to write to it."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f'--push_to_hub {name!r} is no name of a repository ({error}): write user/name') from error
    if not get_token():
        raise UserError('there is no token of the Hugging Face Hub: run hf auth login, or set HF_TOKEN')


def push(folder, arguments):
    """Upload the folder and return its address. UserError if that fails; the token is in no message."""
    from huggingface_hub import HfApi, get_token
    api = HfApi()
    try:
        name = api.create_repo(arguments.push_to_hub, private=arguments.private or None, exist_ok=True).repo_id
        if arguments.private and not api.model_info(name).private:
            raise UserError(f'{name} is there already, and public: make it private on the Hub, or name another')
        api.upload_folder(repo_id=name, folder_path=folder, commit_message='Exported from nanoRETRO')
    except UserError:
        raise
    except Exception as error:  # of the Hub's answers, of the network, of the transfer: many unrelated classes
        said = f'{type(error).__name__}: {" ".join(str(error).split())}'.replace(get_token(), '(hidden)')[:300]
        raise UserError(f'{arguments.to} is complete, but was not uploaded to {arguments.push_to_hub} ({said}): see to '
                        f'the network, and to the rights of the token') from error
    return f'{api.endpoint}/{name}'


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
