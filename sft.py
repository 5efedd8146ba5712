"""
Tunes a pretrained model on conversations, so that it answers: instruction tuning, with the training loop of train.py.

    python sft.py config/sft_quickstart.py                                    # from the quickstart's model
    python sft.py --init_from=out/my_run --out_dir=out/tuned --template=plain \\
        --train_datasets="['chats.jsonl']" --val_datasets="['held_out.jsonl']"
    python sft.py config/sft_quickstart.py --passages=prompt --passages_from=collection    # with passages to read
    python sft.py config/sft_quickstart.py --freeze_retrieval=True            # the decoder alone, as InstructRetro does
    python sft.py config/sft_quickstart.py --init_from=resume                 # go on after an interruption
    python sft.py --help                                                      # all settings

Architecture, tokenizer and how retrieval is done are those of the model in init_from: an out_dir, a checkpoint's
folder, an export, or 'gpt2'. Datasets are conversations (data/conversations.py), and the loss is on answers alone.
"""
import os
from contextlib import ExitStack

import train
from configurator import UserError, load_settings, named_settings, user_errors_as_one_line
from retrieval.knowledge_base import is_local
from training.checkpoint import find_source, source_settings

TAKEN = ('retrieval_mode', 'retrieval_rerank', 'retrieval_embedding_model', 'retrieval_milvus_uri',
         'retrieval_collection', 'retrieval_index', 'retrieval_search_params', 'retrieval_vectors', 'template')


def read_settings(arguments):
    """As train.read_settings: also how the model retrieves, and its template, if it has been tuned before."""
    settings, named = load_settings(arguments, can_dry_run=True), named_settings(arguments)
    if settings.dry_run:
        os.environ['HF_HUB_OFFLINE'] = '1'  # nothing is downloaded
    is_new = settings.init_from != 'resume' and not settings.eval_only
    if settings.init_from == 'scratch' and is_new:
        raise UserError("init_from is 'scratch', and tuning starts from a pretrained model: name its out_dir, an "
                        "export, or 'gpt2', or 'resume' to go on in out_dir")
    if is_new and os.path.realpath(settings.init_from) == os.path.realpath(settings.out_dir):
        raise UserError(f'out_dir {settings.out_dir!r} is the run of init_from, which stays as it is: name another')
    given, source = source_settings(settings), find_source(settings)  # None: GPT-2
    if not is_new and not source.settings.get('template'):
        raise UserError(f'the checkpoint in out_dir {settings.out_dir!r} was not tuned: name it in init_from, and '
                        f'another out_dir')
    is_retro = source is not None and source.model['use_retrieval']
    given |= {key: source.settings[key] for key in TAKEN if source and key in source.settings}
    given.setdefault('use_retrieval', is_retro)
    settings = load_settings(arguments, given=given, can_dry_run=True)
    if is_retro and not settings.use_retrieval:
        raise UserError(f'use_retrieval is False, and init_from {settings.init_from!r} is a RETRO: to tune its decoder '
                        f'alone, without retrieval, set freeze_retrieval to True instead')
    if not settings.template:
        raise UserError("template is '', and conversations are written by one: set it to 'instructretro', 'plain' or a "
                        "text with the places {system}, {user}, {assistant}")
    if is_new and 'retrieval_milvus_uri' in given.keys() - named:  # a server that a stranger's checkpoint names
        if 'retrieval_milvus_token' in named and not is_local(settings.retrieval_milvus_uri):
            raise UserError(f'retrieval_milvus_token is given, and init_from alone names the server: if '
                            f'{settings.retrieval_milvus_uri} may have it, give --retrieval_milvus_uri, too')
        settings.retrieval_milvus_token = ''
    return settings, given


if __name__ == '__main__':
    with user_errors_as_one_line(), ExitStack() as cleanup:
        train.main(cleanup, read_settings)
