"""What unlearning is compared with: fine-tuning on retained samples, gradient ascent, GradDiff, NPO."""
