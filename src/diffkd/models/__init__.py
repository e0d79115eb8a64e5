"""Models: one file per source, reached by names such as `timm/resnet50` or `cifar/resnet8x4`."""
