"""torchtune decoders with LoRA from a Hugging Face folder's config.json.

`known` reads config.json of each family into a `DecoderShape`, `build` makes the decoder of it,
`names` and `checkpoint` bring the weights. docs/models.md says how a family is added.
"""
