"""Configurations of UNets: small ones of each kind, and those of the models that people run."""

BASE = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": (1, 1, 2),
    "transformer_layers_per_block": (1, 2, 1),
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
REFINER = BASE | {
    "block_out_channels": (8, 16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 2, 4, 4),
    "layers_per_block": 1,
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
CONVOLUTIONS = BASE | {
    "use_linear_projection": False,
    "layers_per_block": 1,
    "addition_embed_type": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
TOLD = {"time_cond_proj_dim": 32}  # the guidance scale
KINDS = {
    "base": BASE,
    "refiner": REFINER,
    "convolutional projections": CONVOLUTIONS,
    "told the guidance": BASE | TOLD,
    "told the guidance, of one text encoder": CONVOLUTIONS | TOLD,
}

FULL_BASE = BASE | {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "norm_num_groups": 32,
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_SD15 = CONVOLUTIONS | {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
}
FULL_SD21 = FULL_SD15 | {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
FULL_TOLD = {"time_cond_proj_dim": 256}
FULL_REFINER = REFINER | {
    "block_out_channels": (384, 768, 1536, 1536),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
