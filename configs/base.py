"""Every key of a run, with its default. A recipe starts from this and changes what it needs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default configuration; each value can be set as `--config.key=value`."""
    return ConfigDict(
        dict(
            seed=0,
            batch_size=256,  # pairs per optimizer step, over all devices and processes
            steps=0,  # optimizer steps; 0: use epochs
            epochs=0.0,  # passes over the data (the sum of all sources); 0: use steps
            remat="none",  # 'none' | 'dots' | 'named' | 'full': what the backward pass recomputes
            accumulate_steps=1,  # micro-batches per step; the contrastive loss stays exact
            image_sizes=(),  # ((share of the steps, image size), ...) before the model's own size
            text_lengths=(),  # captions of a batch are cut to the smallest of these that fits ...
            text_parts=1,  # ... and with n > 1 the longest n-th of them runs apart from the others
            init_from="",  # a run, checkpoint or converted weights to start from
            model=model(),
            head=dict(
                kind="",  # '' | 'classification' (of images) | 'answer' (to questions) | 'pair'
                num_queries=1,  # of the head's attentional pooler
                width=0,  # of that pooler; 0: that of the decoder
                num_heads=0,  # of its attention; 0: as model.pooler
                classes="",  # a text file, one class a line; '': the class names of the data
                unknown="refuse",  # 'refuse' | 'skip': examples with no label among the classes
                weight=1.0,  # of the head's loss, beside the weights of `loss`
                label_smoothing=0.0,  # of the head's loss
            ),
            loss=dict(
                contrastive_weight=1.0,
                captioning_weight=2.0,
                contrastive="softmax",  # 'softmax' | 'sigmoid'
                reduction="sum",  # of the two directions: 'sum' (paper, Eq. 2) | 'mean'
                contrastive_chunk=0,  # columns per tile of the similarity matrix; 0: one tile
                caption_chunk=0,  # tokens per chunk of the softmax projection; 0: all at once
                z_loss=0.0,  # weight of log-sum-exp squared in the captioning loss
                label_smoothing=0.0,  # of the captioning loss
                duplicate_texts="negatives",  # 'negatives' (paper) | 'ignore' | 'positives'
            ),
            optimizer=dict(
                name="adafactor",  # 'adafactor' | 'adamw' | 'muon'
                learning_rate=8e-4,  # with a head: that of the head
                encoder_learning_rate=-1.0,  # of all else; 0: frozen, -1: as learning_rate
                layer_decay=1.0,  # factor on the rate for each layer below the top
                warmup_steps=0,
                schedule="linear",  # after warm-up: 'linear' | 'cosine' to zero | 'constant'
                weight_decay=0.01,  # decoupled, on matrices only
                beta1=0.9,  # these two also of what Muon leaves to AdamW
                beta2=0.999,
                clip_norm=1.0,  # global gradient norm; 0: no clipping
                ema=0.0,  # decay of the averaged parameters used in evaluation; 0: none
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: the devices that are left
            data=dict(
                sources=(),  # dicts: path|tfds|builtin, split, kind 'caption'|'label', weight
                vocabulary="",  # a tokenizer file; '': trained on the run's own text
                label_token=False,  # a reserved symbol before label texts
                prompts="varied",  # of label texts: a set of data/prompts.py, or a text file
                augment="none",  # 'none' | 'crop' | 'inception' | 'drawing' | 'randaugment'
                randaugment=(2, 10),  # its operations one after another, their magnitude 0 to 30
                flip=False,  # random left-right flip
                resize="squash",  # evaluation and plain resize: 'squash' | 'crop' (shortest side)
                fast_resize=False,  # cheaper JPEG decoding and resize, still antialiased
                num_frames=0,  # of clips, sampled uniformly; 0: images
                frame_jitter=False,  # sample anywhere in each segment of a clip, not its middle
                max_bad_fraction=0.01,  # undecodable images tolerated before the run stops
                num_threads=0,  # decoding threads; 0: one per core
                loader="direct",  # 'direct' | 'seqio' (needs the extra 'seqio'); equal batches
            ),
            checkpoint=dict(
                every_steps=1000,
                keep=3,  # the newest ones
                max_skipped=50,  # steps in a row without finite gradients that end the run; 0: none
            ),
            eval=dict(every_steps=0, tasks=()),  # tasks also run once at the end of training
            log=dict(every_steps=10, profile_steps=()),
        ),
        convert_dict=True,
    )


def model() -> dict:
    """The paper's architecture at its Base size (Table 1)."""
    return dict(
        image_size=288,
        patch_size=18,
        embed_dim=768,  # of the contrastive space
        dtype="bfloat16",  # compute; parameters stay float32
        image_mean=(0.5, 0.5, 0.5),  # pixels in [0, 1] minus this ...
        image_std=(0.5, 0.5, 0.5),  # ... over this
        temperature=0.07,  # initial; learned
        implementation="auto",  # 'auto' | 'xla' (no kernels of others) | 'reference' (plain JAX)
        qk_norm=False,  # RMS norm of queries and keys in each head, in all towers
        activation="gelu",  # 'gelu' | 'gelu_exact' | 'quick_gelu' | 'relu'
        image=dict(
            width=768,
            depth=12,
            mlp_dim=3072,
            num_heads=12,
            patch_dropout=0.0,  # share of patches left out in training (FLIP)
            conv_widths=(),  # stages of a convolutional stem in place of plain patches ...
            conv_depths=(),  # ... and their residual blocks
        ),
        text=dict(
            width=768,
            unimodal_depth=12,
            multimodal_depth=12,
            mlp_dim=3072,
            num_heads=12,
            vocab_size=64_000,
            max_len=64,  # caption tokens with begin and end, without [CLS]
            tie_embeddings=False,
        ),
        pooler=dict(kind="cascade", num_queries=256, num_heads=12),
    )
