// Pictures of a slide on their way. One that leaves the screen before it came is not waited for; should it come back, it
// is asked for anew. OpenSeadragon itself would wait for every one that it once wanted.
export class Coming {
  jobs = new Map(); // of OpenSeadragon -> what stops them, null while they are off the screen
  // The two by which a tile source fetches its tiles.
  fetching() {
    return {
      downloadTileStart: (job) => this.ask(job),
      downloadTileAbort: (job) => { this.jobs.get(job)?.abort(); this.jobs.delete(job); },
    };
  }
  async ask(job) {
    const stop = new AbortController();
    this.jobs.set(job, stop);
    try {
      const answer = await fetch(job.src, { signal: stop.signal });
      if (!answer.ok) throw new Error(`error ${answer.status}`);
      const picture = await answer.blob();
      this.jobs.delete(job);
      job.finish(picture, null, "rasterBlob");
    } catch (error) {
      if (stop.signal.aborted) return;
      this.jobs.delete(job);
      job.fail(error.message, null);
    }
  }
  // The navigator shows all of the slide, always.
  look(viewer) {
    const seen = viewer.viewport.getBounds(true);
    for (const [job, stop] of this.jobs) {
      const { bounds, tiledImage } = job.tile;
      const here = tiledImage.viewer !== viewer || (bounds.x < seen.x + seen.width && bounds.y < seen.y + seen.height
        && bounds.x + bounds.width > seen.x && bounds.y + bounds.height > seen.y);
      if (here && !stop) this.ask(job);
      else if (!here && stop) { stop.abort(); this.jobs.set(job, null); }
    }
  }
}
