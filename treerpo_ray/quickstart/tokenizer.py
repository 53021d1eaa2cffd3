"""The byte-level tokenizer of the embedded model: 256 bytes, an end token and a padding token."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = "<|eos|>"
PAD = "<|pad|>"
MAX_LENGTH = 512

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a byte, so that any text passes through and comes back.

    Special tokens written out in a text stay bytes. The chat template is each message's text and
    a newline.
    """
    # The byte-level alphabet stands for the 256 bytes; sorted, so that ids do not depend on a hash.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=MAX_LENGTH,
    )
