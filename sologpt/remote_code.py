"""
The code that an export of ModernGPT brings along, for transformers to run with trust_remote_code=True.

It is modeling_sologpt.py, which is transformers' side, with the definitions of model.py itself put into it
at the time of the export: there is no second version of the architecture, which could differ from the first.
What is new in model.py goes along by itself; what transformers does not need is named in LEFT_OUT, and what
model.py imports for it in NEEDED.
"""

import ast
import inspect
import os

from sologpt import layers, loss

FILE = "modeling_sologpt.py"
CONFIG = dict(  # what config.json says besides the fields of GPTConfig
    architectures=["SoloGPTForCausalLM"],
    auto_map=dict(
        AutoConfig="modeling_sologpt.SoloGPTConfig",
        AutoModelForCausalLM="modeling_sologpt.SoloGPTForCausalLM",
    ),
    model_type="sologpt",
    tie_word_embeddings=False,
)
PLACE = "# [here an export has the classes of model.py]\n"
NEEDED = (loss.capped, layers.SquaredReLU, layers.squared_relu)
# of model.py: what only GPT-2 has, and what trains, samples, counts and saves
LEFT_OUT = """
GPTConfig Block make_gpt
GPT.make_layers GPT.forward GPT.hidden
GPT.looked_up GPT.get_num_params GPT.flops_per_token GPT.estimate_mfu GPT.configure_optimizers
GPT.empty_cache GPT.prompt_logits GPT.next_logits GPT.generate GPT.from_pretrained GPT.save_pretrained
ModernGPT.looked_up ModernGPT.save_pretrained
""".split()


def modeling_file(source):
    """Returns the text of an export's modeling_sologpt.py; source is the text of model.py."""
    with open(os.path.join(os.path.dirname(__file__), FILE), encoding="utf-8") as f:
        text = f.read()
    parts = [inspect.getsource(part) for part in NEEDED]
    return text.replace(PLACE, "\n" + "\n\n".join([*parts, definitions(source)]))


def definitions(source):
    """Returns the definitions in the text of a module, word for word, without those in LEFT_OUT."""
    lines = source.splitlines(keepends=True)
    docstring, *body = ast.parse(source).body
    start = docstring.end_lineno
    left_out = left_out_lines(body, start)
    kept = [line for number, line in enumerate(lines) if number >= start and number not in left_out]
    return "".join(kept).strip("\n") + "\n"


def left_out_lines(body, start, owner=""):
    """Returns the numbers, from 0 on, of the lines of body's imports and of what LEFT_OUT names.

    body: the statements of a module or of the class owner, from line start on. The comments and blank lines
    above a statement belong to it.
    """
    numbers = set()
    for node in body:
        name = owner + getattr(node, "name", "")
        if isinstance(node, (ast.Import, ast.ImportFrom)) or name in LEFT_OUT:
            numbers |= set(range(start, node.end_lineno))
        elif isinstance(node, ast.ClassDef):
            numbers |= left_out_lines(node.body, node.lineno, f"{name}.")
        start = node.end_lineno
    return numbers
