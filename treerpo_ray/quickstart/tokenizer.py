"""The byte-level tokenizer of the embedded model: 256 bytes, an end token and a padding token."""

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

EOS = "<|endoftext|>"
PAD = "<|pad|>"
MAX_LENGTH = 512
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def make_tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer with one token a byte, so that any text passes through it.

    A text comes back as it was, but for Unicode normalisation (NFC), as with every Qwen2 model:
    transformers builds this class for the architecture, whatever a `tokenizer.json` says. Special
    tokens written out in a text stay bytes. The chat template is each message and a newline.
    """
    # The alphabet stands for the 256 bytes; sorted, since it comes in any order.
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS, PAD]
    return Qwen2Tokenizer(
        vocab={symbol: token_id for token_id, symbol in enumerate(symbols)},
        merges=[],
        unk_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        split_special_tokens=True,
        model_max_length=MAX_LENGTH,
    )
