"""A trained run, loaded from its out_dir with the settings that made it: what sampling and evaluating start from."""
import os

from configurator import UserError, load_settings
from data.tokenizer import load_tokenizer, vocabulary_hash
from model import RETRO, RETROConfig, load_checkpoint
from retrieval.embedding import pick_device


def load_run(out_dir, overrides=()):
    """
    The settings, tokenizer, model in evaluation mode and device of a run. `overrides` (--key=value) change its
    settings, but not its architecture. UserError where there is no such run, or it does not fit what is here now.
    """
    try:
        checkpoint = load_checkpoint(os.path.join(out_dir, 'ckpt.pt'))
    except ValueError as error:
        raise UserError(str(error)) from error
    settings = load_settings(overrides, given=checkpoint['config'])
    changed = [key for key in checkpoint['model_args'] if key != 'retrieval_k_neighbors'
               and key in settings and settings[key] != checkpoint['config'].get(key)]
    if changed:
        raise UserError(f'{", ".join(changed)} can not be changed after training: leave it out')
    device = pick_device(settings['device'])
    tokenizer = load_tokenizer(settings['tokenizer'])
    if vocabulary_hash(tokenizer) != checkpoint['vocabulary_hash']:
        raise UserError(f'the checkpoint in {out_dir!r} was trained with another tokenizer than '
                        f'{settings["tokenizer"]!r} is now (vocabulary {checkpoint["vocabulary_hash"]}, found '
                        f'{vocabulary_hash(tokenizer)}): bring that tokenizer back, or train anew')
    model = RETRO(RETROConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['model'])
    return settings, tokenizer, model.eval().to(device), device
