"""The folder of a study and its stages in order: inspect, encode, pretrain, embed, probe."""
