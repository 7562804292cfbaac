"""What a checkpoint learns after training: from its own traffic's votes, with the backbone frozen."""
