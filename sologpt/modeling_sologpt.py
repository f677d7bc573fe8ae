"""
A language model of soloGPT's modern architecture, for Hugging Face's transformers: trust_remote_code=True
loads it from the folder of this file, and needs torch and transformers only.

SoloGPTConfig and SoloGPTForCausalLM are what transformers asks for. The classes above them are those with
which the model was trained; sample.py --export copies them from soloGPT's model.py. MIT licence.

Shapes: B sequences, T new tokens, L tokens with those before them, C = n_embd, H = n_head, D = C / H.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

UserError = ValueError  # in soloGPT a class of its own
Linear = nn.Linear  # there too; tools that quantize replace torch's own

# [here an export has the classes of model.py]


# -----------------------------------------------------------------------------
# transformers' side


class SoloGPTConfig(PretrainedConfig):
    model_type = "sologpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = dict(
        hidden_size="n_embd",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
        max_position_embeddings="block_size",
    )

    def __init__(
        self,
        block_size=1024,  # longest context, in tokens
        vocab_size=50257,
        n_layer=12,
        n_head=12,
        n_embd=768,
        dropout=0.0,
        bias=True,  # biases in Linear
        gelu="none",  # not used by this architecture
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_embd = n_embd
        self.dropout = dropout
        self.bias = bias
        self.gelu = gelu
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class CachedLayer:
    """The past of one layer, as the attention above takes it, in a cache of transformers' (or in none)."""

    def __init__(self, cache, layer, mask):
        self.cache = cache
        self.layer = layer
        self.mask = mask  # (B or 1, 1, T, L), what each new token sees; None: a text from its beginning on

    def extend(self, k, v):
        """Stores new keys and values, (B, H, T, D). Returns those of all L tokens."""
        if self.cache is None:
            return k, v
        return self.cache.update(k, v, self.layer)

    def before(self, x):
        """Stores embeddings (B, T, C), as keys of one head without values. Returns those of the token before
        each that it sees; before the first one are zeros."""
        known, _ = self.extend(x.unsqueeze(1), x[:, None, :, :0])
        known = known[:, 0]
        if self.mask is None:
            return F.pad(known[:, :-1], (0, 0, 1, 0))
        B, T, C = x.shape
        key = torch.arange(known.size(1), device=x.device)
        seen_before = self.mask[:, 0] & (key < key[-T:, None])  # (B or 1, T, L)
        last = (seen_before * key).amax(-1).expand(B, T)
        before = known.gather(1, last[..., None].expand(B, T, C))
        return before * seen_before.any(-1, keepdim=True)


def make_room_for_embeddings(cache, n_layer):
    """Adds a layer to a cache that generate() made with one for each block; others grow by themselves. Raises
    ValueError for a cache of a fixed length, and for one that something else has filled."""
    layers = getattr(cache, "layers", [])
    if len(layers) != n_layer:
        return
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"this model needs a DynamicCache, not a {type(cache).__name__}")
    if cache.get_seq_length():
        raise ValueError("this cache lacks the embeddings, which this model keeps in a layer of their own")
    layers.append(type(layers[-1])())


class Decoder(ModernGPT):
    forward = ModernGPT.hidden  # called as a module, so that offloading finds the weights that it uses itself


class SoloGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SoloGPTConfig
    base_model_prefix = "gpt"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Decoder"]  # the whole model on one device

    def __init__(self, config):
        super().__init__(config)
        self.gpt = Decoder(config)
        # kept among the weights: computed in 16 bits, or not at all, it would be wrong
        self.gpt.register_buffer("rotary", self.gpt.rotary)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: ModernGPT initialises itself."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Returns what transformers does. Raises ValueError if the folder lacks a weight, or has it in
        another size, which transformers can be told to ignore: it would be what the memory held before."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = list(info["missing_keys"])
        for key in info["mismatched_keys"]:
            if not isinstance(key, str):  # from transformers 5 on it is with both sizes
                key = key[0]
            missing.append(key)
        missing = [key for key in missing if key.startswith("gpt.")]  # a subclass may add more
        if missing:
            raise ValueError(
                f"the folder has no {min(missing)} of the size that this model needs; "
                f"resize_token_embeddings changes the vocabulary"
            )
        if output_loading_info:
            return model, info
        return model

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def set_input_embeddings(self, embedding):
        self.gpt.transformer.wte = embedding

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def set_output_embeddings(self, head):
        self.gpt.lm_head = head

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Does what transformers does, and the same for the table of values, which has as many rows. With
        mean_resizing=False new rows are N(0, 0.02), as GPT-2's."""
        before = self.gpt.transformer.wte.num_embeddings
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = embedding.num_embeddings
        table = self.gpt.transformer.wve
        table = self._get_resized_embeddings(table, rows, mean_resizing=mean_resizing)
        self.gpt.transformer.wve = table
        if not mean_resizing:
            for layer in (embedding, table, self.gpt.lm_head):
                torch.nn.init.normal_(layer.weight.data[before:], std=0.02)
        return embedding

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """Returns the logits, fp32 (B, T, V), of the last logits_to_keep positions (0: of all; a tensor: of
        those), the loss if there are labels, and the cache, unless use_cache=False or in training.

        input_ids: int64 (B, T), the new tokens. attention_mask: (B, L), 0 where there is padding. labels:
        int64 (B, T), the same ids, -100 where one does not count; the loss is the mean cross-entropy, in
        nats, of predicting each from those before it. position_ids: (B, T); None: padding is not counted.
        With no mask and nothing in the cache, one that does not follow the one before begins another text,
        which sees nothing of those before. Raises ValueError for more than block_size tokens, padding and
        cache included, and for what only other models take or return.
        """
        self.refuse_what_only_others_serve(input_ids, kwargs)
        B, T = input_ids.shape
        if use_cache is None:
            use_cache = not self.training and getattr(self.config, "use_cache", True)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        make_room_for_embeddings(past_key_values, self.config.n_layer)
        start = 0
        if past_key_values is not None:
            start = past_key_values.get_seq_length()
        L = start + T
        self.check_lengths(attention_mask, B, L)
        key = torch.arange(L, device=input_ids.device)  # offloaded weights have another device
        mask = self.visible(attention_mask, position_ids, start, key)
        if position_ids is None:
            position_ids = self.positions(attention_mask, start, key)
        pasts = [CachedLayer(past_key_values, layer, mask) for layer in range(self.config.n_layer + 1)]
        x = self.gpt(input_ids, position_ids, pasts)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        logits = self.gpt.logits(x[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        if return_dict is False:
            return output.to_tuple()
        return output

    def refuse_what_only_others_serve(self, input_ids, kwargs):
        """Raises ValueError for arguments, or flags of the config, that this model could only ignore."""
        for name in ("output_hidden_states", "output_attentions"):
            asked = kwargs.pop(name, None)
            if asked is None:
                asked = getattr(self.config, name, False)
            if asked:
                raise ValueError(f"this model does not serve {name}")
        if kwargs.pop("inputs_embeds", None) is not None or input_ids is None:
            raise ValueError("this model does not serve inputs_embeds, it needs input_ids")

    def check_lengths(self, attention_mask, B, L):
        if L > self.config.block_size:
            raise ValueError(
                f"{L} tokens, with padding, are more than block_size={self.config.block_size}, the longest "
                f"context of this model: cut the prompt or lower max_new_tokens"
            )
        if attention_mask is not None and attention_mask.shape != (B, L):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, it must be {(B, L)}: a value "
                f"for each token, those in the cache included"
            )

    def positions(self, attention_mask, start, key):
        """Returns the positions of tokens start to L - 1, (B or 1, T), counted without padding. key: 0 to
        L - 1."""
        if attention_mask is None:
            return key[None, start:]
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]

    def visible(self, attention_mask, position_ids, start, key):
        """Returns what tokens start to L - 1 see, bool (B or 1, 1, T, L); None: each all up to itself. key: 0
        to L - 1."""
        if attention_mask is None and start == 0:
            return self.visible_of_packed(position_ids)
        query = key[start:, None]
        mask = (key <= query)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
            mask = mask | (key == query)  # padding sees itself: of nothing, torch before 2.5 makes NaN
        return mask

    def visible_of_packed(self, position_ids):
        """Returns what the tokens of packed texts see, bool (B or 1, 1, T, T): those of their own text so
        far. None if there are no position_ids: it is one text."""
        if position_ids is None:
            return None
        begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0))
        text = begins.cumsum(1)
        same = text[:, :, None] == text[:, None]
        return same.tril()[:, None]
