# ruff: noqa: RUF001 (DeepSeek's bars)
"""Chat templates with the rules of those in the wild, in short form of our own.

Each has what its family's does to a conversation: where system turns go, which roles there are,
what becomes of thinking, what a variable changes.
"""

from dataclasses import dataclass, field
from typing import Any

from chat_families import (
    GEMMA,
    Family,
    byte_level,
    control_tokens,
    sentencepiece,
)
from tokenizers import AddedToken, pre_tokenizers, processors

# The system turn has a day, by default one that stands in the template.
LLAMA_3_1 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Roles in turn; the system turn stands in the last user turn (3) or before all (7).
_MISTRAL_TURNS = """\
{%- for m in turns %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}{{ '[INST]' + LAST + m.content + '[/INST]' }}
    {%- else %}{{ m.content + eos_token }}{% endif %}
{%- endfor %}"""
_MISTRAL_SYSTEM = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set system = none %}{% set turns = messages %}{% endif %}
{{- bos_token }}"""
_LAST_USER = "(system + '\\n\\n' if system and loop.index0 > turns | length - 3 else '')"
MISTRAL_3 = _MISTRAL_SYSTEM + _MISTRAL_TURNS.replace("LAST", _LAST_USER)
MISTRAL_7 = (
    _MISTRAL_SYSTEM
    + "{%- if system %}{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{% endif %}"
    + _MISTRAL_TURNS.replace("LAST + ", "")
)

# The assistant's role is "model", and a system turn opens the first user turn.
GEMMA_3 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}""" + GEMMA.replace(
    "m['content'] | trim", "(first if loop.first else '') + m['content'] | trim"
)

# Only what is behind the last question keeps its thinking, and an answer there gets some.
QWEN_3 = """\
{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.looking and m.role == 'user' %}
        {%- set ns.looking = false %}{% set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {%- set opening = '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' %}
            {%- set content = opening + content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# No marks around the system turn; R1 asks for thinking and drops it from the answers that it shows,
# V3.1 asks for what `thinking` says.
_DEEPSEEK = """\
{%- if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='') %}
{%- for m in messages if m['role'] == 'system' %}
    {%- set ns.system = ns.system + m['content'] %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages if m['role'] != 'system' %}
    {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
    {%- else %}
        {%- set content = m['content'].split('</think>')[-1] %}
        {{- '<｜Assistant｜>SHOWN' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}ASKED{% endif %}"""
DEEPSEEK_R1 = _DEEPSEEK.replace("SHOWN", "").replace("ASKED", "{{ '<think>\\n' }}")
DEEPSEEK_3_1 = _DEEPSEEK.replace("SHOWN", "</think>").replace(
    "ASKED", "{{ '<think>' if thinking else '</think>' }}"
)

# Only an answer that is not the last has a line's end behind it.
OLMO_2 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' + m['content'] + eos_token + ('' if loop.last else '\\n') }}
    {%- else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Answers are marked for training, by a branch for each mode.
SMOLLM_3 = """\
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') }}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}
            {%- if enable_thinking %}
                {{- '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
            {%- else %}
                {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}
                {{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}
            {%- endif %}
        {%- endgeneration %}
    {%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}
{%- endif %}"""

# Marks text alone, so that a token may reach over the mark.
BARE = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A: ' }}{% generation %}{{ m.content + '\\n' }}{% endgeneration %}
    {%- else %}{{ m.role + ': ' + m.content + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'A: ' }}{% endif %}"""


@dataclass
class Wild:
    """A template with a tokenizer of its kind.

    Attributes:
        family: The tokenizer and the template.
        arguments: Of the template.
        system: Whether conversations may have a system turn.
        opening: What the template puts before a last answer that its prompt does not end with.
    """

    family: Family
    arguments: dict[str, Any] = field(default_factory=dict)
    system: bool = True
    opening: str = ""


def _wild() -> dict[str, Wild]:
    chatml = control_tokens("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tags = [AddedToken(n, special=False, normalized=False) for n in ("<think>", "</think>")]
    header = control_tokens("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    inst = control_tokens("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    turns = control_tokens("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
    deep = control_tokens(
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
    )
    olmo = control_tokens("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
    mistral = sentencepiece(inst, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    llama = Family(byte_level(header), LLAMA_3_1, "<|eot_id|>", "<|begin|>")
    qwen = Family(byte_level(chatml + tags), QWEN_3, "<|im_end|>")
    smol = Family(byte_level(chatml + tags), SMOLLM_3, "<|im_end|>")
    deepseek = [
        Family(byte_level(deep + tags), template, deep[1].content, deep[0].content)
        for template in (DEEPSEEK_R1, DEEPSEEK_3_1)
    ]
    # With trimmed offsets transformers marks nothing from an answer that begins with a space on.
    bare = byte_level(control_tokens("<eos>"))
    bare.post_processor = processors.ByteLevel(trim_offsets=False)
    empty = "<think>\n\n</think>\n\n"
    return {
        "llama 3.1": Wild(llama),
        "llama 3.1, a day": Wild(llama, {"date_string": "28 Nov 2026"}),
        "mistral 3": Wild(Family(mistral, MISTRAL_3, "</s>", "<s>")),
        "mistral 7": Wild(Family(mistral, MISTRAL_7, "</s>", "<s>")),
        "gemma 2": Wild(Family(byte_level(turns), GEMMA, "<eos>", "<bos>"), system=False),
        "gemma 3": Wild(Family(byte_level(turns), GEMMA_3, "<eos>", "<bos>")),
        "qwen 3": Wild(qwen, opening=empty),
        "qwen 3, no thinking": Wild(qwen, {"enable_thinking": False}),
        "qwen 3, thinking": Wild(qwen, {"enable_thinking": True}, opening=empty),
        "deepseek r1": Wild(deepseek[0]),
        "deepseek 3.1": Wild(deepseek[1]),
        "olmo 2": Wild(Family(byte_level(olmo), OLMO_2, "<|endoftext|>", "<|endoftext|>")),
        "smollm 3": Wild(smol, {"enable_thinking": False}),
        "smollm 3, thinking": Wild(smol),
        "bare": Wild(Family(bare, BARE, "<eos>")),
    }


WILD = _wild()
