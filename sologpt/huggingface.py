"""
Hugging Face's format: the folders from which transformers loads a GPT-2, with tokenizer and model card, and a
ModernGPT, with the code that remote_code.py assembles. The latter are written, never read.

GPT.from_pretrained and GPT.save_pretrained (model.py) read and write them; sample.py --export adds the
tokenizer and the card. Needs safetensors, and huggingface_hub for OpenAI's models: pip install '.[hf]'.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import shutil

import torch

from sologpt import remote_code
from sologpt.errors import UserError, first_line, first_mismatch
from sologpt.files import make_folder
from sologpt.tokenizer import EOT, CharacterTokenizer, gpt2_tokenizer, read_tokenizer

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's, on the hub

# config.json: its names for the fields of GPTConfig; in REST, what else it must say, or omit, to be our GPT-2
NAMES = dict(
    vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd"
)
# activation_function: GPTConfig.gelu
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
REST = dict(
    model_type="gpt2",
    n_inner=None,  # 4 * n_embd
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
    tie_word_embeddings=True,
)
# weights: the same names as ours; these are of a Conv1D, which keeps (in, out) where Linear keeps (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def require(module):
    """Returns the module of that name. Raises UserError, with the command to install it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"{package}, which Hugging Face's format needs, is not installed: pip install '.[hf]'"
        ) from None


# -----------------------------------------------------------------------------
# reading


def find_folder(name):
    """Returns name if it is a folder, else the folder of OpenAI's model of that name, in the hub's cache."""
    if os.path.isdir(name):
        return name
    if name not in PRETRAINED:
        raise FileNotFoundError(
            f"there is no folder {name!r}, and the only known names are {', '.join(PRETRAINED)}"
        )
    hub = require("huggingface_hub")
    try:
        earlier = hub.snapshot_download(name, local_files_only=True)  # as nanoGPT has downloaded it
        if os.path.exists(os.path.join(earlier, "model.safetensors")):
            return earlier
    except OSError:  # it is not there
        pass
    try:
        return hub.snapshot_download(
            f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]
        )
    except Exception as e:  # of many kinds, most of them about the network
        raise OSError(
            f"cannot download {name} from the Hugging Face hub ({first_line(e)}); without a network, "
            f"copy the model's folder here and give its path instead of {name}"
        ) from e


def read_config(folder):
    """Returns the fields of GPTConfig, a dict, that folder's config.json describes. Raises UserError for a
    model that is not our GPT-2, naming every value that differs."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        hint = ""
        if os.path.exists(os.path.join(folder, "ckpt.pt")):
            hint = f"; it is of a run of train.py: --init_from=resume --out_dir={folder}"
        raise FileNotFoundError(f"{folder} is no model in Hugging Face's format: it has no config.json{hint}")
    theirs = read_json(path)
    if theirs.get("model_type") == remote_code.CONFIG["model_type"]:
        raise UserError(
            f"{folder} is an export of arch='modern', which only transformers reads; take the checkpoint "
            f"that it was made of: --init_from=resume, and its --out_dir"
        )
    width = theirs.get("n_embd")
    if type(width) is int and theirs.get("n_inner") == 4 * width:
        theirs["n_inner"] = None
    gelu = theirs.get("activation_function", "gelu_new")
    wrong = [f"{name}={theirs[name]!r}" for name in REST if theirs.get(name, REST[name]) != REST[name]]
    if type(gelu) is not str or gelu not in GELUS:
        wrong.append(f"activation_function={gelu!r}")
    wrong += [f"{name}={theirs.get(name)!r}" for name in NAMES.values() if type(theirs.get(name)) is not int]
    if "model_type" not in theirs:
        wrong.append("no model_type")
    if wrong:
        raise UserError(f"{path} describes a model that differs from GPT-2 here: {', '.join(wrong)}")
    fields = {ours: theirs[name] for ours, name in NAMES.items()}
    return fields | dict(n_ids=fields["vocab_size"], bias=True, gelu=GELUS[gelu])


def read_folder(name, dropout=0.0, block_size=None, **others):
    """Returns GPTConfig's fields and the weights, fp32, by our names, of the GPT-2 that find_folder finds.

    A block_size below its own cuts its position embeddings. Raises UserError for what GPT cannot represent,
    for others, and OSError for files that are not there.
    """
    if others:
        raise UserError(f"override_args may set dropout and block_size, not {', '.join(others)}")
    folder = find_folder(name)
    fields = read_config(folder)
    weights = read_weights(folder)
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.h.")}
    if len(layers) != fields["n_layer"]:  # before a model of any number of layers is built
        raise UserError(
            f"{name} has weights of {len(layers)} layers, and its config.json says {fields['n_layer']}"
        )
    block_size = block_size or fields["block_size"]
    if block_size > fields["block_size"]:
        raise UserError(
            f"block_size={block_size} is more than {name} was trained with: {fields['block_size']}"
        )
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size].clone()
    return fields | dict(block_size=block_size, dropout=dropout), weights


def weight_files(folder):
    """Returns the paths of the weights in a folder: model.safetensors, else the parts that the index of a
    large model names. Other files with such names may be left over from another model."""
    whole = os.path.join(folder, "model.safetensors")
    index = f"{whole}.index.json"
    if os.path.exists(whole):
        return [whole]
    if not os.path.exists(index):
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; only that format, which cannot run code, is read"
        )
    try:
        with open(index, encoding="utf-8") as f:
            names = set(json.load(f)["weight_map"].values())
        paths = [os.path.join(folder, os.path.basename(name)) for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index} is damaged: {e!r}") from None
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing, and {index} names it")
    return paths


def read_weights(folder):
    """Returns the weights of a folder, fp32, by our names; raises as read_folder."""
    load_file = require("safetensors.torch").load_file
    theirs = {}
    for path in weight_files(folder):
        try:
            theirs |= load_file(path)
        except Exception as e:  # SafetensorError, derived from Exception itself, and OSError
            raise UserError(f"cannot read {path}: {e}") from None
    head = theirs.pop("lm_head.weight", None)  # a copy of the embedding, where it is stored at all
    weights = {}
    for name, w in theirs.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in old files
            continue
        if name.endswith(TRANSPOSED):
            w = w.t()
        weights["transformer." + name.removeprefix("transformer.")] = w.float().contiguous()
    for needed in ("transformer.wte.weight", "transformer.wpe.weight"):
        if needed not in weights:
            raise UserError(f"{folder} is no GPT-2 language model: its weights lack {needed}")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if head is not None and not torch.equal(head.float(), weights["lm_head.weight"]):
        raise UserError(f"{folder} has an untied output head; here it is tied to the token embedding")
    return weights


def load_weights(model, weights, name):
    """Gives a model on the meta device the weights of read_folder(name). Raises UserError for a mismatch."""
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        what = f"the weights of {name} are not those of a GPT-2 language model"
        raise UserError(f"{what}: {first_mismatch(e)}") from None


# sha256 of the vocabulary in GPT-2's tokenizer.json or vocab.json, as vocabulary_sha256 computes it
GPT2_VOCABULARY = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"


def read_folder_tokenizer(name):
    """Returns the Tokenizer of the model in a folder, or of OpenAI's of that name; None if the folder does
    not say, or has one that is not known here."""
    if name in PRETRAINED and not os.path.isdir(name):
        return gpt2_tokenizer()
    if os.path.exists(os.path.join(name, "meta.json")):  # we exported it
        return read_tokenizer(name)
    model = read_json(os.path.join(name, "tokenizer.json")).get("model") or {}
    vocabulary = model.get("vocab") or read_json(os.path.join(name, "vocab.json"))
    if not vocabulary or not isinstance(vocabulary, dict):  # that of a Unigram model is a list
        return None
    if vocabulary_sha256(vocabulary) == GPT2_VOCABULARY:
        return gpt2_tokenizer()
    if model.get("type") == "WordLevel" and all(len(text) == 1 for text in vocabulary):
        itos = {i: text for text, i in vocabulary.items()}
        return CharacterTokenizer("characters", len(itos), None, itos)
    return None


def vocabulary_sha256(vocabulary):
    """Returns the sha256 of {text: id}, in the order of the ids."""
    entries = sorted(vocabulary.items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def read_json(path):
    """Returns the dict in a JSON file; empty if there is none. Raises UserError if it is damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None


# -----------------------------------------------------------------------------
# writing

WRITTEN = ("config.json", "generation_config.json", "model.safetensors", "README.md")
WRITTEN += ("tokenizer.json", "tokenizer_config.json", "meta.json", remote_code.FILE)
UNFINISHED = "unfinished"
METADATA = dict(format="pt", writer="soloGPT")  # of the weights' file


@contextlib.contextmanager
def replacing_export(folder):
    """Yields a folder in `folder` to write an export into. Then its files take the place of an earlier
    export's; after an error or Ctrl-C that one stays. Raises UserError if there are files that no export of
    ours writes, or somebody else's model, or if safetensors, which writes the weights, is not installed."""
    require("safetensors.torch")
    make_folder(folder)
    unfinished = os.path.join(folder, UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    earlier = sorted(os.listdir(folder))
    others = [name for name in earlier if name not in WRITTEN]
    if earlier and not is_export(folder):
        others = others or earlier
    if others:
        raise UserError(f"{folder} holds {others[0]}, not written by an export; choose a new or empty folder")
    os.mkdir(unfinished)
    try:
        yield unfinished
        written = os.listdir(unfinished)
        for name in written:
            os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
        for name in set(earlier) - set(written):
            os.remove(os.path.join(folder, name))
    finally:
        shutil.rmtree(unfinished)


def is_export(folder):
    """Whether a folder's weights are as an export of ours wrote them: transformers may have saved others
    there since, and writes other metadata."""
    path = os.path.join(folder, "model.safetensors")
    try:
        with require("safetensors").safe_open(path, "pt") as f:
            return (f.metadata() or {}).get("writer") == METADATA["writer"]
    except (OSError, require("safetensors").SafetensorError):
        return False


def write_json(folder, name, content):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1, ensure_ascii=False)


def write_folder(folder, fields, weights, eot_token):
    """Writes config.json, generation_config.json and model.safetensors for a GPT with these fields of
    GPTConfig and these weights. eot_token: the id that starts and ends a text, or None.

    Raises UserError for weights that are not GPT-2's: a changed model is not what transformers would compute.
    """
    fields = fields | dict(vocab_size=fields["n_ids"])
    tokens = dict(bos_token_id=eot_token, eos_token_id=eot_token)
    config = dict(architectures=["GPT2LMHeadModel"]) | REST
    config |= {theirs: fields[ours] for ours, theirs in NAMES.items()}
    config["n_ctx"] = fields["block_size"]  # as in OpenAI's; llama.cpp's converter reads it
    config["activation_function"] = {"none": "gelu", "tanh": "gelu_new"}[fields["gelu"]]
    config |= tokens
    config |= {name: fields["dropout"] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    theirs = {}
    for name, w in weights.items():
        if name == "lm_head.weight":
            continue  # tied: it is wte.weight
        if name == "transformer.wte.weight":
            w = w[: fields["n_ids"]]
        stored = w.t() if name.endswith(TRANSPOSED) else w
        theirs[name] = stored.detach().cpu().float().contiguous()
        if not fields["bias"] and name.startswith(("transformer.h.", "transformer.ln_f.")):
            theirs[name.removesuffix("weight") + "bias"] = torch.zeros(len(w))  # theirs has biases
    if odd := sorted(gpt2_names(fields["n_layer"]) ^ theirs.keys()):
        raise UserError(f"this model is not transformers' GPT-2: only one of the two has {odd[0]}")
    if weights["lm_head.weight"].data_ptr() != weights["transformer.wte.weight"].data_ptr():
        raise UserError("this model is not transformers' GPT-2, whose head is the embedding's matrix")
    write_files(folder, config, tokens, theirs)


def gpt2_names(n_layer):
    """Returns the names of all weights of transformers' GPT-2, a set."""
    parts = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    modules = ["ln_f", *(f"h.{i}.{part}" for i in range(n_layer) for part in parts)]
    names = {f"transformer.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return names | {"transformer.wte.weight", "transformer.wpe.weight"}


def write_modern_folder(folder, model, eot_token):
    """Writes what write_folder writes, for a ModernGPT, and the code with which transformers loads it."""
    ours = dataclasses.replace(model.config, vocab_size=model.config.n_ids)
    with torch.device("meta"):  # takes no memory
        unpadded = dict(named_tensors(type(model)(ours)))
    weights = {}
    for name, w in named_tensors(model):
        rows = w[: len(unpadded[name])]  # without those that pad the vocabulary
        weights[f"gpt.{name}"] = rows.detach().cpu().float().contiguous()
    tokens = dict(bos_token_id=eot_token, eos_token_id=eot_token)
    config = remote_code.CONFIG | dataclasses.asdict(ours) | tokens
    code = remote_code.modeling_file(inspect.getsource(inspect.getmodule(type(model))))
    write_files(folder, config, tokens, weights)
    with open(os.path.join(folder, remote_code.FILE), "w", encoding="utf-8") as f:
        f.write(code)


def named_tensors(model):
    """Returns (name, tensor) for all parameters and buffers, also those that checkpoints leave out."""
    return [*model.named_parameters(), *model.named_buffers()]


def write_files(folder, config, tokens, weights):
    """Writes config.json, generation_config.json and model.safetensors. Raises OSError if it cannot."""
    save_file = require("safetensors.torch").save_file
    make_folder(folder)
    write_json(folder, "config.json", config)
    write_json(folder, "generation_config.json", tokens)
    path = os.path.join(folder, "model.safetensors")
    try:
        save_file(weights, path, metadata=METADATA)
    except require("safetensors").SafetensorError as e:
        raise OSError(f"{path} could not be written: {e}") from None


def byte_alphabet():
    """Returns GPT-2's printable stand-ins for the 256 bytes, a list of characters: printable Latin-1 stands
    for itself, the characters from 256 on for the others (https://github.com/openai/gpt-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def bpe_merges(ranks):
    """Returns the merges, pairs of bytes ordered by rank, that made the tokens of ranks, {bytes: rank}.

    A token is made by the last merge of its own bytes when only merges of lower ranks are available.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def character_tokenizer_json(tokenizer):
    """Returns the content of tokenizer.json for one id a character; there too, other ones are an error."""
    itos = tokenizer.itos
    if len(itos) < tokenizer.vocab_size:
        raise UserError(f"its meta.pkl names only {len(itos)} of {tokenizer.vocab_size} ids")
    if odd := [text for text in itos.values() if len(text) != 1]:
        raise UserError(
            f"a tokenizer of characters cannot be exported with {odd[0]!r}, which is not one character"
        )
    return dict(
        version="1.0",
        added_tokens=[],
        pre_tokenizer=dict(type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False),
        decoder=dict(type="Fuse"),
        model=dict(type="WordLevel", vocab={text: i for i, text in itos.items()}, unk_token="<unk>"),
    )


def tokenizer_json(tokenizer):
    """Returns the content of tokenizer.json for a Tokenizer. Raises UserError for an encoding that the
    tokenizers library would not split exactly as we do."""
    encoding, eot = tokenizer.encoding, tokenizer.eot_token
    if encoding == "characters":
        return character_tokenizer_json(tokenizer)
    if encoding not in ("gpt2", "bytes"):
        raise UserError(f"the encoding {encoding!r} cannot be exported, only gpt2, bytes and characters can")
    letters = byte_alphabet()
    ranks = tokenizer.ranks()

    def spell(token):
        return "".join(letters[b] for b in token)

    byte_level = dict(
        type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=encoding == "gpt2"
    )
    vocabulary = {spell(token): i for token, i in ranks.items()}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = []
    if eot is not None:
        added = [dict(id=eot, content=EOT) | special]
        vocabulary[EOT] = eot
    return dict(
        version="1.0",
        added_tokens=added,
        pre_tokenizer=byte_level,
        decoder=byte_level,
        model=dict(
            type="BPE",
            vocab=vocabulary,
            merges=[[spell(a), spell(b)] for a, b in bpe_merges(ranks)],
        ),
    )


def write_tokenizer(folder, tokenizer, block_size):
    """Writes the files from which AutoTokenizer loads a Tokenizer, and meta.json for read_tokenizer (not for
    characters: it has no place for their table). Raises as tokenizer_json does, before it writes anything."""
    content = tokenizer_json(tokenizer)
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=block_size)
    settings["clean_up_tokenization_spaces"] = False
    # transformers 4 adds token_type_ids if it is not told, and a GPT-2 then adds the embeddings of those ids
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    settings["padding_side"] = "left"  # generate() goes on from the last position
    if tokenizer.eot_token is not None:
        settings |= dict(bos_token=EOT, eos_token=EOT)
    write_json(folder, "tokenizer.json", content)
    write_json(folder, "tokenizer_config.json", settings)
    if tokenizer.encoding != "characters":
        write_json(folder, "meta.json", tokenizer.fields())


CARD = """---
library_name: transformers
pipeline_tag: text-generation
{tags}---
{what}, trained with soloGPT. It continues text; it was not trained to follow instructions,
and nothing keeps it from writing what is false or offensive.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
text = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50, do_sample=True)
print(tokenizer.decode(text[0]))
```
{note}
| | |
|---|---|
"""
GPT2_CARD = CARD.format(
    tags="tags: [gpt2]\n",
    what="A GPT-2 language model",
    load='model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
    note="",
)
MODERN_CARD = CARD.format(
    tags="",
    what="A language model of soloGPT's modern architecture",
    load="""model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)""",
    note="""
`trust_remote_code=True` runs `modeling_sologpt.py` of this folder, which imports torch and transformers only.
""",
)


def write_card(folder, state, parameters):
    """Writes README.md, a model card with those training figures that the checkpoint holds."""
    rows = dict(parameters=f"{parameters:,}")
    sizes = "{n_layer} layers, {n_head} heads, {n_embd} wide, context of {block_size}"
    rows["architecture"] = sizes.format(**state["model_args"])
    if "tokenizer" in state:
        rows["tokenizer"] = "{encoding}, {vocab_size:,} ids".format(**state["tokenizer"])
    if "iter_num" in state:
        rows["training iterations"] = f"{state['iter_num']:,}"
    if "tokens_seen" in state:
        rows["training tokens"] = f"{state['tokens_seen']:,}"
    if math.isfinite(state.get("best_val_loss", math.inf)):
        rows["lowest validation loss of the run"] = f"{float(state['best_val_loss']):.4f} nats per token"
    config = state.get("config", {})
    for name in ("dataset", "init_from", "learning_rate", "weight_decay", "dropout"):
        if name in config:
            rows[name] = f"`{config[name]}`"
    card = {"gpt2": GPT2_CARD, "modern": MODERN_CARD}[state["arch"]]
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(card + "".join(f"| {name} | {value} |\n" for name, value in rows.items()))
