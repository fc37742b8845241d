"""What every room uses: errors, files, images, processes. Imports nothing of ours."""
