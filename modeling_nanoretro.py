"""
The network of model.py as a model of Hugging Face transformers. export.py copies both files into the folder that it
writes, where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds them:

    model(input_ids, labels=labels).loss                                # without retrieval
    model(input_ids, neighbors=..., neighbor_mask=..., pointers=...).logits
    model.generate(input_ids, max_new_tokens=100)                       # no cache: the whole window for every token
    model.model.generate(tokens, 100, retrieve, point)                  # RETRO.generate, which retrieves as it goes
"""
import math
from contextlib import nullcontext
from dataclasses import asdict, fields

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import RETRO, RETROConfig


class NanoRetroConfig(PretrainedConfig):
    """The fields of RETROConfig, and transformers' own. ValueError if they contradict."""
    model_type = 'nanoretro'
    has_no_defaults_at_init = True  # so that save_pretrained writes all fields
    attribute_map = dict(hidden_size='n_embd', max_position_embeddings='block_size', num_attention_heads='n_head',
                         num_hidden_layers='n_layer')

    def __init__(self, **given):
        ours = RETROConfig(**{f.name: given.pop(f.name) for f in fields(RETROConfig) if f.name in given})
        for key, value in asdict(ours).items():
            setattr(self, key, value)
        super().__init__(**{'tie_word_embeddings': True, **given})

    def of_network(self):
        """The RETROConfig."""
        return RETROConfig(**{f.name: getattr(self, f.name) for f in fields(RETROConfig)})


class NanoRetroForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoRetroConfig
    base_model_prefix = 'model'
    _supports_sdpa = True  # it is what model.attend uses
    _tied_weights_keys = {'model.lm_head.weight': 'model.transformer.wte.weight'}

    def __init__(self, config):
        super().__init__(config)
        self.model = RETRO(config.of_network())
        self.post_init()

    def _init_weights(self, module):
        """RETRO has initialized itself."""

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, embeddings):
        self.model.transformer.wte = embeddings

    def get_output_embeddings(self):
        return self.model.lm_head

    def set_output_embeddings(self, linear):
        self.model.lm_head = linear

    def forward(self, input_ids, attention_mask=None, labels=None, neighbors=None, neighbor_mask=None, pointers=None,
                doc_ids=None, use_cache=None, return_dict=None):
        """
        Logits (B, T, V) of input_ids (B, T) and, with labels (B, T), which are shifted here, -100 where there is none,
        the mean loss in nats. The others are arguments of RETRO.forward: neighbors (B, L, K, R) of the L <= T / C
        complete chunks, neighbor_mask of the same shape (default: all are tokens), pointers (B, T, P, 3), doc_ids
        (B, T / C); use_cache changes nothing: there is no cache. With pointers the logits are log-probabilities.
        ValueError for what the model cannot read.
        """
        c = self.model.config
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError('attention_mask has padding before a token, and the chunk grid starts at the first one: '
                             'pad on the right')
        if neighbors is not None and not c.has_neighbors:
            raise ValueError('neighbors are given, and this model reads none: leave them out')
        if pointers is not None and not c.has_pointers:
            raise ValueError('pointers are given, and this model reads none: leave them out')
        if neighbors is not None and neighbor_mask is None:
            neighbor_mask = torch.ones_like(neighbors, dtype=torch.bool)
        given = dict(neighbors=neighbors, neighbor_mask=neighbor_mask, doc_ids=doc_ids, pointers=pointers)
        loss = None
        # weights in half precision are computed with as in training: what needs float32 stays in it
        is_half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(input_ids.device.type, self.dtype) if is_half else nullcontext():
            if labels is not None:
                targets = F.pad(labels[:, 1:], (0, 1), value=-1)
                logits, loss = self.model(input_ids, targets.masked_fill(targets < 0, -1), **given)
            if labels is None or pointers is not None:  # with targets and pointers logits are the decoder's own
                with torch.set_grad_enabled(loss is None and torch.is_grad_enabled()):
                    logits, _ = self.model(input_ids, **given)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, neighbors=None, neighbor_mask=None,
                                      pointers=None, **others):
        """The window of the last tokens, as RETRO.generate moves it. New tokens have neither neighbors nor pointers."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError('the prompts have several lengths: generate from each one alone')
        c, T = self.model.config, input_ids.shape[1]
        C = min(c.retrieval_chunk_size, c.block_size)
        first = max(0, math.ceil((T - c.block_size) / C))  # whole chunks leave the window
        inputs = dict(input_ids=input_ids[:, first * C:])
        if neighbors is not None:
            inputs |= dict(neighbors=neighbors[:, first:],
                           neighbor_mask=None if neighbor_mask is None else neighbor_mask[:, first:])
        if pointers is not None:
            inputs['pointers'] = F.pad(pointers, (0, 0, 0, 0, 0, T - pointers.shape[1]))[:, first * C:]
        return inputs
