"""Videos through an image encoder: each frame is an image, and a video's tokens are those of all its frames (BLIP,
section 5.5).

Letters: B samples, F frames, S tokens of an image, E width.
"""

from torch import Tensor

from lavis_lite.nn.vision import ImageEncoder


def frame_tokens(encoder: ImageEncoder, image: Tensor) -> Tensor:
    """Return the tokens (B,S,E) of images (B,3,H,W), or (B,FxS,E) of videos (B,3,F,H,W), frame after frame."""
    if image.dim() == 4:
        return encoder(image)
    frames_BF = image.transpose(1, 2)
    return encoder(frames_BF.flatten(0, 1)).unflatten(0, frames_BF.shape[:2]).flatten(1, 2)


def visual_summary(encoder: ImageEncoder, tokens: Tensor, image: Tensor) -> Tensor:
    """Return what stands for a whole image among its tokens, (B,E): the class token, or the mean of all tokens if the
    encoder has none. Of videos (B,3,F,H,W) it is the mean over the frames. `image` tells videos from images.
    """
    if not encoder.has_class_token:
        return tokens.mean(dim=1)
    if image.dim() < 5:
        return tokens[:, 0]
    return tokens.unflatten(1, (image.shape[2], -1))[:, :, 0].mean(dim=1)
