"""What the Samba paper prints of its own throughput (third version, figures 2b and 6, section 3.3), one A100, bf16.

Read off the figure of generation to about 3 tokens/s; of the figure of prompts only its closing ratio is printed.
"""

GENERATION_BATCH = 16
# tokens a second of the whole batch, by the length generated
GENERATION: dict[str, dict[int, float]] = {
    "samba": {1024: 450, 2048: 486, 4096: 508, 8192: 519, 16384: 513, 32768: 520, 65536: 522},
    "swa": {1024: 436, 2048: 438, 4096: 452, 8192: 477, 16384: 477, 32768: 482, 65536: 484},
    "mamba": {1024: 330, 2048: 333, 4096: 326, 8192: 328, 16384: 321, 32768: 337, 65536: 327},
    "transformer": {1024: 425, 2048: 454, 4096: 461, 8192: 414, 16384: 333, 32768: 234, 65536: 143},
}
GENERATION_RATIO = 3.64  # Samba over the Transformer at 65536
PROMPT_TOKENS = 131072  # of all rows together, at every length
PROMPT_RATIO = 3.73  # Samba over the Transformer for one prompt of 131072
